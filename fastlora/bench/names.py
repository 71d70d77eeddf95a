"""Names that the command line offers; apart, so that its help does not wait for torch."""

PRESETS = ("quick", "qlora", "lorafusion", "llama8b", "llama70b", "full")
SECTIONS = ("layer", "host", "decoder", "finetune", "experts", "batches")
ADDED = ("experts", "batches")  # of those, what reports of earlier versions lack
