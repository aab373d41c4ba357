"""GSM8K-Aug text files become the problems that the official conversion makes of them."""

from __future__ import annotations

import pytest

from coconut_fast.data.gsm8k import read_gsm8k


def save(folder, text):
    path = folder / "gsm.txt"
    path.write_bytes(text.encode())
    return path


def test_lines_become_problems(tmp_path):
    text = (
        "Out of 600 employees, 30% left.  How many stayed?||<<600*30/100=180>> <<600-180=420>> #### 420\n"
        "\n"
        "No chain, one sum?|| #### 1,000\r\n"
        "Zoë\u2019s \u2028 eggs?||<<1+1=2>>##2"
    )
    first, second, third = read_gsm8k(save(tmp_path, text))
    assert first.question == "Out of 600 employees, 30% left.  How many stayed?"
    assert first.steps == ["<<600*30/100=180>>", "<<600-180=420>>"] and first.answer == "420"
    assert second.steps == [""] and second.answer == "1,000"
    assert third.question == "Zoë\u2019s \u2028 eggs?" and third.steps == ["<<1+1=2>>"] and third.answer == "2"


@pytest.mark.parametrize(
    "line, message",
    [
        ("question <<1+1=2>> #### 2", r"line 2: found 0 times '\|\|', expected once"),
        ("a||b||c #### 2", r"line 2: found 2 times '\|\|', expected once"),
        ("question||<<1+1=2>> 2", "line 2: found no '####' after"),
        ("question||<<1+1=2>> ####  ", "line 2: the answer is empty"),
        (" ||<<1+1=2>> #### 2", "line 2: the question is empty"),
    ],
)
def test_a_broken_line_is_one_clear_error(tmp_path, line, message):
    path = save(tmp_path, f"good||<<1+1=2>> #### 2\n{line}\n")
    with pytest.raises(ValueError, match=message) as caught:
        read_gsm8k(path)
    assert str(path) in str(caught.value)


def test_an_empty_or_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the file is empty; expected lines of the form"):
        read_gsm8k(save(tmp_path, "\n \n"))
    with pytest.raises(ValueError, match="cannot be read"):
        read_gsm8k(tmp_path / "nowhere.txt")
