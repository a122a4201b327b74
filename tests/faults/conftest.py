from tests.data.conftest import merging

__all__ = ["merging"]
