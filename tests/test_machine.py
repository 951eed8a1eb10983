"""What is said of the machine."""

from pathlib import Path

import pytest

from memforge.machine import cpu_name

ZEN_3 = """processor\t: 0
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC
stepping\t: 1
flags\t\t: fpu avx avx2 sha_ni

"""


def test_processors_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def name_by(text: str) -> str:
        monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
        return cpu_name()

    other = ZEN_3.replace("25", "26").replace("avx2", "avx2 avx512f")
    assert name_by(ZEN_3 + other) == "AMD EPYC (family 25, model 1, stepping 1, avx2)"
    assert name_by(other + ZEN_3) == "AMD EPYC (family 26, model 1, stepping 1, avx512f)"
    assert name_by("")  # where a system has no such file, or says nothing there
