"""The log of a run: losses stay on the device until a line is due, and then go to two places."""

import math
import time

import torch
from torch import Tensor

from antlm.checkpoint import RunFolder
from config import UserError, require


class TrainingLog:
    """Sums up what happened since the last line, and writes lines to the screen and the run folder.

    state: what state() returned to the checkpoint that a run goes on from; empty for a new run
    """

    def __init__(self, run: RunFolder, schedule, settings, objectives: list[str], state: dict):
        self.run = run
        self.processes = run.processes
        self.schedule = schedule
        self.settings = settings
        self.objectives = objectives
        self.pending = []  # steps whose losses the host has not seen
        self.started = time.time()
        self.steps_since_start = 0
        self.restart()
        self.skipped = state.get("skipped", 0)  # steps whose loss or gradient was not finite
        if self.processes.rank == 0:  # the sums of all processes were saved as one
            self.loss_sums |= state.get("loss_sums", {})
            self.counts |= state.get("counts", {})

    def state(self) -> dict:
        """Return what a checkpoint keeps, so that a resumed run's next line is on as many steps."""
        loss_sums, counts = self.totals()
        return {"skipped": self.skipped, "loss_sums": loss_sums, "counts": counts}

    def restart(self):
        """Begin a new line."""
        self.loss_sums = dict.fromkeys(self.objectives, 0.0)
        self.counts = dict.fromkeys(self.objectives, 0)
        self.steps = 0
        self.last_line = time.time()

    def add(self, step: int, micro_batches: list, losses: list[Tensor], norm: Tensor):
        """Note a step; nothing here waits for the device.

        losses: summed, one a micro-batch; norm: of the gradient, the same in all processes
        """
        parts = [(micro_batch.objective, micro_batch.n_scored) for micro_batch in micro_batches]
        self.pending.append((step, parts, torch.stack((norm, *losses))))
        self.steps += 1
        self.steps_since_start += 1

    def read(self):
        """Wait for the device and take up the pending steps.

        Raises UserError where more of them are not finite than may be skipped.
        """
        for step, parts, numbers in self.pending:
            self.norm, *losses = numbers.tolist()
            if not math.isfinite(self.norm):
                self.skip(step, parts, losses)
                continue
            for (objective, n_scored), loss in zip(parts, losses, strict=True):
                self.loss_sums[objective] += loss
                self.counts[objective] += n_scored
        self.pending.clear()

    def skip(self, step: int, parts: list, losses: list[float]):
        """Count and report a step that the optimizer has passed over, in all processes alike."""
        n_bad = dict.fromkeys(self.objectives, 0)
        for (objective, _), loss in zip(parts, losses, strict=True):
            if not math.isfinite(loss):
                n_bad[objective] += 1
        text = f"step {step}: gradient norm {self.norm} is not finite"
        totals = self.processes.sum(list(n_bad.values()))
        for objective, total in zip(self.objectives, totals, strict=True):
            if total:
                text += f", nor the {objective} loss of {total:.0f} micro-batch(es)"

        self.skipped += 1
        if self.skipped > self.settings.skip_nonfinite:
            raise UserError(
                f"{self.run.path}: {text}; nothing was saved since the last checkpoint; lower lr "
                "or clip, or allow --skip_nonfinite=N such steps"
            )
        self.processes.print(f"{text}; skipped")

    def mean_losses(self) -> dict[str, float]:
        """Nats per scored token since the last line, over all processes, of what was trained."""
        loss_sums, counts = self.totals()
        means = {}
        for objective in self.objectives:
            if counts[objective] > 0:
                means[objective] = loss_sums[objective] / counts[objective]
        return means

    def totals(self) -> tuple[dict[str, float], dict[str, float]]:
        """Summed losses and numbers of scored tokens since the last line, over all processes."""
        n = len(self.objectives)
        sums = self.processes.sum([*self.loss_sums.values(), *self.counts.values()])
        loss_sums = dict(zip(self.objectives, sums[:n], strict=True))
        return loss_sums, dict(zip(self.objectives, sums[n:], strict=True))

    def write(self, step: int, lr: float, mask_rate: float):
        """Print and record a line on the steps since the last one."""
        self.read()
        losses = self.mean_losses()
        now = time.time()
        tokens = self.steps * self.settings.batch_rows * self.settings.block_size
        tokens_per_s = tokens / (now - self.last_line)
        seconds_per_step = (now - self.started) / self.steps_since_start
        minutes, seconds = divmod(int(seconds_per_step * (self.schedule.steps - step)), 60)

        epoch = step / self.schedule.steps_per_epoch
        line = f"step {step}/{self.schedule.steps}  epoch {epoch:.2f}/{self.schedule.epochs}  "
        line += f"{self.schedule.phase(step - 1)}  "
        line += "".join(f"{name} {loss:.3f}  " for name, loss in losses.items())
        if self.skipped:
            line += f"skipped {self.skipped}  "
        line += f"lr {lr:.2e}  {tokens_per_s:,.0f} tokens/s  {minutes}:{seconds:02} left"
        self.processes.print(line)

        self.run.record(
            **self.position(step),
            loss=losses,
            lr=lr,
            grad_norm=self.norm if math.isfinite(self.norm) else None,
            skipped=self.skipped,
            mask_rate=mask_rate,
            tokens_per_s=round(tokens_per_s),
        )
        self.restart()

    def write_dev(self, step: int, losses: dict[str, float]):
        """Print and record losses on the dev tokens; raises UserError where one is not finite."""
        text = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        self.processes.print(f"step {step}/{self.schedule.steps}  dev loss  {text}")
        require(
            all(math.isfinite(loss) for loss in losses.values()),
            f"{self.run.path}: dev loss not finite at step {step}; nothing was saved since the "
            "last checkpoint",
        )
        self.run.record(**self.position(step), dev=losses)

    def position(self, step: int) -> dict:
        """Where the run stands after so many steps, as each line of metrics.jsonl says it."""
        return dict(
            step=step,
            epoch=round(step / self.schedule.steps_per_epoch, 4),
            phase=str(self.schedule.phase(step - 1)),
            words=self.schedule.words(step),
        )
