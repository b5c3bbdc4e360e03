"""What the programs stand on."""

IGNORE = -100  # a target with this value is not scored; the ignore_index of torch's cross_entropy
