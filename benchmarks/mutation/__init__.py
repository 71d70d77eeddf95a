"""How many mutants made by rule the tests find."""
