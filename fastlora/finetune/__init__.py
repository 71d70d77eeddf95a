"""The parts of `fastlora finetune`: data, models, the training loop, measurements and the report."""
