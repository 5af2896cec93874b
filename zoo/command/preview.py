HELP = "what the model will see"
EXAMPLE = ""


def add_options(one):
    pass
