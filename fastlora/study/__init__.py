"""The parts of `fastlora study`: the plan, runs shared by processes, results, pictures and the suggestion."""
