"""Claims in miniature: what a paper claims, declared in a YAML file and run through the same recipes that users run."""
