"""The `zoo` command: recipes and rows through LightningCLI, runs, cards in print, pictures."""
