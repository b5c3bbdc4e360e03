"""Checkpoints, and the folder of a run: what must survive a kill at any moment."""

import fcntl
import hashlib
import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from antlm.distributed import Processes, launch_name, started_by_torchrun
from antlm.files import write_json, write_whole
from antlm.tokenizer import Tokenizer
from config import UserError, require
from model import ModelConfig, Transformer

ROOT = Path(__file__).parent.parent


# ------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(path: Path, model: Transformer, **content):
    """Write the model and plain data to one file, which is either whole or not there."""
    content["config"] = asdict(model.config)
    content["model"] = dict(model.state_dict())
    write_whole(path, lambda file: torch.save(content, file))


def load_checkpoint(path: Path, device: str = "cpu") -> dict:
    """Return the content of a checkpoint as plain data; no code in it is run.

    Raises UserError where the file is missing, damaged or not one of ours.
    """
    try:
        damaged = damaged_record(path)
        require(damaged is None, f"{path}: damaged, {damaged} in it is not as it was written")
        content = torch.load(path, map_location=device, weights_only=True)
        require(isinstance(content, dict), f"{path}: not a checkpoint of train.py")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path}: damaged, or it holds code, which is not loaded") from None
    except UserError:
        raise
    except Exception as error:  # a damaged file can make torch.load and zipfile raise anything
        reason = one_line(error)
        raise UserError(f"{path}: damaged, or not a checkpoint of train.py ({reason})") from None
    return content


def damaged_record(path: Path) -> str | None:
    """Return the name of a record that is not as torch.save wrote it; torch.load would read it."""
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            # torch.save writes 0. A flipped bit makes a folder of the record, which no checksum
            # covers, and for which torch.load returns memory that nothing has written to
            if record.external_attr != 0:
                return record.filename
        return archive.testzip()  # the first whose checksum does not match


def one_line(error: Exception) -> str:
    """The kind of an error and the beginning of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run folder, newest first."""
    files = [file for file in Path(run).glob("step_*.pt") if file.stem[5:].isdecimal()]
    return sorted(files, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step that a checkpoint's name tells."""
    return int(path.stem.removeprefix("step_"))


def load_newest(run: Path, warn: Callable = print) -> tuple[Path | None, dict | None]:
    """Return path and content of the newest whole checkpoint of a run, (None, None) without one.

    Damaged ones are named and passed over.
    """
    for path in checkpoints(run):
        try:
            return path, load_checkpoint(path)
        except UserError as error:
            warn(f"skipped {error}")
    return None, None


# Which weights of a checkpoint are used: the average where there is one, or the last ones.
WEIGHTS = ("average", "last")
WEIGHTS_HELP = "average: of the run's average_share, where there is one; default: %(default)s"


def load_model(
    content: dict, device: str = "cpu", path: Path | str = "checkpoint", weights: str = "last"
) -> Transformer:
    """Return the model of a loaded checkpoint, in evaluation mode.

    weights: one of WEIGHTS
    Raises UserError, which begins with `path`, where its sizes and weights do not fit model.py.
    """
    try:
        model = Transformer(ModelConfig(**content["config"]))
        model.load_state_dict(content["model"])
        if weights == "average":
            # tied weights have one name there
            model.load_state_dict(content["average"]["weights"], strict=False)
    except (KeyError, TypeError, RuntimeError, UserError) as error:
        reason = one_line(error)
        raise UserError(f"{path}: not a checkpoint of this model.py ({reason})") from None
    return model.to(device).eval()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file: the identity of a checkpoint."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class LoadedRun:
    """A checkpoint with all that is needed to use its model."""

    path: Path
    content: dict
    model: Transformer
    tokenizer: Tokenizer
    weights: str  # which ones the model has, one of WEIGHTS

    @property
    def settings(self) -> dict:
        return self.content["settings"]

    @property
    def step(self) -> int:
        return self.content["step"]

    @property
    def boundary(self) -> str:
        return self.content["boundary"]

    @property
    def schedule(self) -> str:
        return self.settings["schedule"]

    @property
    def history(self) -> list[dict]:
        """The runs whose weights this one was started from (init_from), the oldest first."""
        return self.content.get("history", [])

    @property
    def full_schedule(self) -> str:
        """The schedules of those runs and of this one: all that the model has been trained with."""
        schedules = [entry["schedule"] for entry in self.history]
        return "+".join([*schedules, self.schedule])

    @property
    def template(self) -> dict[str, bool] | None:
        """Whether an imported model has a start and an end token around a text.

        None for a model of ours, which has a start token in front.
        """
        return self.content.get("template")

    @property
    def absent(self) -> list[int]:
        """Tokens of ours that an imported model does not have."""
        return self.content.get("absent", [])

    @property
    def block_size(self) -> int:
        return self.settings["block_size"]

    def history_entry(self) -> dict:
        """Return what the history of a model that comes from this one says of it."""
        return {
            "path": str(self.path),
            "sha256": file_sha256(self.path),
            "schedule": self.schedule,
            "words": self.content.get("words"),
        }

    def describe(self) -> str:
        """Say which model this is."""
        text = f"{self.path}: step {self.step} of {self.schedule}, {self.model.config.backbone}"
        if self.weights == "average":
            text += f", average of {self.content['average']['n']} steps"
        return text


def load_run(path: str, device: str | torch.device = "cpu", weights: str = "average") -> LoadedRun:
    """Load a checkpoint, or the newest whole one of a run folder, with the tokenizer beside it.

    weights: one of WEIGHTS; a checkpoint without an average has the last ones only
    Raises UserError that names the file which is missing or does not fit the others.
    """
    file = Path(path)
    if file.is_dir():
        file, content = load_newest(file, lambda text: print(text, file=sys.stderr))
        require(content is not None, f"{path}: holds no whole checkpoint (step_*.pt of train.py)")
    else:
        content = load_checkpoint(file)

    tokenizer = Tokenizer(file.parent / "tokenizer.json")
    for key in ("step", "settings", "boundary", "tokenizer_sha256"):
        require(key in content, f"{file}: not a checkpoint of this train.py, it lacks {key!r}")
    require(
        tokenizer.sha256 == content["tokenizer_sha256"],
        f"{file.parent}/tokenizer.json: not the one that {file.name} was trained with",
    )
    if not content.get("average"):
        weights = "last"
    model = load_model(content, device, file, weights)
    return LoadedRun(file, content, model, tokenizer, weights)


def load_source(path: str, config: ModelConfig, corpus) -> dict:
    """Return what a new run takes from another one (init_from): its weights and its history.

    path: run folder or checkpoint; config: the sizes of the new run
    Raises UserError that names the size, or the tokenizer, which is not the same.
    """
    source = load_run(path)
    require(
        source.tokenizer.sha256 == corpus.tokenizer.sha256,
        f"init_from = {path}: was trained with another tokenizer than {corpus.folder} has; prepare "
        f"the text again with --tokenizer={source.path.parent / 'tokenizer.json'}",
    )
    for name, value in asdict(config).items():
        # dropout is no size, and a padded vocabulary is larger than the tokenizer's
        if name not in ("dropout", "vocab_size"):
            value_there = getattr(source.model.config, name)
            require(
                value_there == value,
                f"init_from = {path}: was trained with {name}={value_there!r}, not {value!r}",
            )
    return {
        "config": source.content["config"],
        "model": source.model.state_dict(),
        "history": [*source.history, source.history_entry()],
    }


# ----------------------------------------------------------------------------------- the run folder


def restore(
    content: dict, path: Path, model: Transformer, optimizers: list, average
) -> tuple[int, dict]:
    """Put weights, optimizers and average back; return the steps done and the state of the log.

    content: of the run's checkpoint, of load_source, or empty for a run from scratch
    average: a WeightAverage of the model
    Raises UserError, which begins with `path`, where they do not fit this model and optimizer.
    """
    try:
        if "model" in content:
            model.load_state_dict(content["model"])
        if "optimizer" in content:
            for optimizer, state in zip(optimizers, content["optimizer"], strict=True):
                optimizer.load_state_dict(state)
        average.load_state_dict(content.get("average", {}))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a checkpoint of this train.py ({one_line(error)})") from None
    return content.get("step", 0), content.get("log", {})


class RunFolder:
    """The folder of one run: lock, settings, metrics, source and checkpoints.

    Only the first process writes. The lock lasts until this object is gone.
    """

    def __init__(self, path: str, processes: Processes, resume: bool):
        self.path = Path(path)
        self.processes = processes
        self.path.mkdir(parents=True, exist_ok=True)
        if processes.rank == 0:
            self.take_lock()
            self.refuse_to_overwrite(resume or self.restarted)
            self.remove_leftovers()
        processes.wait()

    def take_lock(self):
        """Lock the folder; raises UserError where another process holds it."""
        self.lock = open(self.path / "lock", "a+")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with this process
        except BlockingIOError:
            raise UserError(
                f"{self.path}: another train.py is at work in it; wait for its end or choose "
                "another --out_dir"
            ) from None
        except OSError as error:
            self.processes.print(
                f"{self.path}: its file system has no locks ({error.strerror}); do not start a "
                "second run in it"
            )

        # torchrun --max-restarts starts the same command again: that means go on
        self.lock.seek(0)
        self.restarted = started_by_torchrun() and self.lock.read() == launch_name()
        if self.restarted:
            self.processes.print(f"{self.path}: started again by torchrun, so --resume")
        self.lock.truncate(0)
        self.lock.write(launch_name())
        self.lock.flush()

    def refuse_to_overwrite(self, resume: bool):
        for newest in checkpoints(self.path)[:1]:
            require(
                resume,
                f"{self.path}: holds a run already ({newest.name}); go on with --resume or choose "
                "another --out_dir",
            )

    def remove_leftovers(self):
        """Remove the unfinished files of a process that was killed."""
        for part in self.path.glob("**/.*.part"):
            part.unlink()

    def newest(self, settings, free: set[str], corpus) -> dict | None:
        """Return the content of the checkpoint to go on from; None for a new run.

        free: names of settings that may differ from those of the checkpoint
        Raises UserError where another setting, corpus or tokenizer made it, or where the processes
        do not all find the same one.
        """
        path, content = load_newest(self.path, self.processes.print)
        step = content["step"] if content else 0
        require(
            self.processes.sum([step]) == [step * self.processes.world],
            f"{self.path}: not all processes find the same checkpoint in it; it must be one "
            "folder for all",
        )
        if content is None:
            n = len(checkpoints(self.path))
            require(
                n == 0,
                f"{self.path}: none of its {n} checkpoints is whole; choose another --out_dir",
            )
            return None

        require(
            content["optimizer"],
            f"{path}: holds no optimizer, as imported models do; start a new run from it with "
            f"--init_from={path} and another --out_dir",
        )
        saved = asdict(type(settings)()) | content["settings"]  # an older run lacks newer settings
        for name, value in asdict(settings).items():
            require(
                name in free or saved[name] == value,
                f"{path}: was trained with {name}={saved[name]!r}, not {value!r}; a changed "
                "setting needs a new --out_dir",
            )
        for key, value in identity(corpus).items():
            require(
                content[key] == value,
                f"{path}: was trained on another corpus or tokenizer than {corpus.folder} ({key})",
            )
        return content

    def begin(self, settings, corpus, schedule, step: int, history: list[dict]):
        """Write down what this run is, and drop the metrics of steps that will be done again."""
        self.settings = settings
        self.history = history
        self.schedule = schedule
        self.identity = identity(corpus)
        last_dev = 0
        if self.processes.rank == 0:
            last_dev = self.keep_metrics(step)
            self.write_settings(corpus)
        # the step of the last evaluation, which the first process has read for all
        [self.evaluated_step] = self.processes.sum([last_dev])

    def write_settings(self, corpus):
        settings = self.settings
        write_json(self.path / "settings.json", asdict(settings))
        self.copy(corpus.folder / "tokenizer.json", "tokenizer.json")
        # a result carries the code that made it
        for pattern in ("*.py", "config/*.py", "antlm/*.py"):
            for file in ROOT.glob(pattern):
                self.copy(file, f"source/{file.relative_to(ROOT)}")

    def copy(self, source: Path, name: str):
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, lambda file: file.write(source.read_bytes()))

    def keep_metrics(self, step: int) -> int:
        """Keep the lines of metrics.jsonl up to a step; a kill may have cut the last one short.

        Returns the step of the last evaluation in them, 0 without one.
        """
        metrics = self.path / "metrics.jsonl"
        kept = []
        evaluated_step = 0
        if metrics.exists():
            for line in metrics.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"}\n"):
                    continue
                entry = json.loads(line)
                if entry["step"] <= step:
                    kept.append(line)
                    if "dev" in entry:
                        evaluated_step = entry["step"]
        write_whole(metrics, lambda file: file.writelines(kept))
        return evaluated_step

    def record(self, **entry):
        """Append a line to metrics.jsonl; raises OSError that names it."""
        if self.processes.rank:
            return
        metrics = self.path / "metrics.jsonl"
        try:
            # opened anew for each line, so that a folder that is gone is noticed
            with open(metrics, "a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:  # that of a write does not know its file
            raise OSError(error.errno, error.strerror, str(metrics)) from None

    def save(self, step: int, model: Transformer, optimizers: list, **content):
        """Write a checkpoint; keep the newest few, and for good those of phase ends and marks."""
        if self.processes.rank:
            return
        save_checkpoint(
            self.path / f"step_{step:07}.pt",
            model,
            step=step,
            words=self.schedule.words(step),
            settings=asdict(self.settings),
            history=self.history,
            optimizer=[optimizer.state_dict() for optimizer in optimizers],
            **self.identity,
            **content,
        )
        # later ones than this are damaged: resume went back before them
        earlier = [file for file in checkpoints(self.path) if step_of(file) <= step]
        for file in earlier[self.settings.keep :]:
            if not self.schedule.is_milestone(step_of(file), self.settings.babylm_rules):
                file.unlink()


def identity(corpus) -> dict:
    """What a checkpoint stores of its corpus: hashes of tokenizer and tokens, and the boundary."""
    return {
        "tokenizer_sha256": corpus.tokenizer.sha256,
        "tokens_sha256": corpus.meta["train"]["sha256"],
        "boundary": corpus.boundary,
    }
