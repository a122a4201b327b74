import pytest

from falign.errors import ConfigError
from falign.registry import Registry, import_member, is_own_name

SHAPES = Registry(
    "shape",
    {"square": abs, "circle": "math:sqrt"},
    aliases={"disc": "circle"},
    refused={"blob": "a blob has no edge: choose circle."},
    wanted="function",
)


def test_members_are_found_by_name_by_alias_and_by_import_path():
    assert SHAPES.names() == ("square", "circle")
    assert SHAPES.get("square") is abs
    assert SHAPES.get("disc")(9.0) == SHAPES.get("math:sqrt")(9.0) == 3.0
    assert SHAPES.name_of("disc") == "circle"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sqare", r"draw\.shape='sqare' is unknown; did you mean 'square'\? Choose one of square, circle, or give mod"),
        ("blob", r"draw\.shape='blob': a blob has no edge"),
        ("math:pi", r"draw\.shape='math:pi' is a float, not a function\."),
        ("math:nothing", r"draw\.shape='math:nothing': module 'math' has no attribute 'nothing'; give an importable"),
        ("no_such_module:Name", r"draw\.shape='no_such_module:Name': No module named 'no_such_module'"),
    ],
)
def test_what_is_no_member_is_refused_with_the_field_and_the_remedy(name, message):
    with pytest.raises(ConfigError, match=message):
        SHAPES.get(name, field="draw.shape")


def test_a_member_that_is_named_by_its_path_is_imported_at_its_first_use_only():
    family = Registry("shape", {"broken": "no_such_module:Name", "square": abs})
    assert family.get("square") is abs
    with pytest.raises(ConfigError, match="No module named 'no_such_module'"):
        family.get("broken")


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("a.b:C.d", True),
        ("a:b", True),
        ("a", False),
        ("C:/folder", False),
        ("q: a", False),
        (":b", False),
        ("1:b", False),
    ],
)
def test_own_names_have_a_module_and_a_name(name, own):
    assert is_own_name(name) is own


def test_a_module_that_raises_is_told_with_its_own_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "raising_member.py").write_text("value = 1 / 0\n")
    with pytest.raises(ConfigError, match=r"(?s)raising_member.py\", line 1.*correct the module"):
        import_member("raising_member:value", place="here")
