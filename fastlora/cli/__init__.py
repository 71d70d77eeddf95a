"""The `fastlora` command."""
