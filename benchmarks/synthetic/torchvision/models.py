"""Names that torchmetrics imports but no example uses: each is an empty class."""


def __getattr__(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})
