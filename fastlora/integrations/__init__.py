"""Ways into existing training code. Nothing is imported here: each module needs the library that it serves."""
