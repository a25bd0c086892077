from rftjax.monitor import reasons


def test_reasons_that_differ_in_numbers_places_and_answers_are_one():
    given = [
        f"ValueError: not 'a {n}' or \"it's\" or 'b' (line {n}, char 0x{n}f, {n}.5e-{n})"
        for n in range(5)
    ]
    assert reasons.commonest([*given, "KeyError: 'answer'"]) == [
        "5 x ValueError: not '…' or \"…\" or '…' (line …, char …, …)",
        "1 x KeyError: 'answer'",
    ]


def test_what_is_the_same_in_all_is_shown():
    assert reasons.commonest(["KeyError: 'answer' 3"] * 2) == ["2 x KeyError: 'answer' 3"]
    assert reasons.commonest(["KeyError: 'a'", "KeyError: 'b'"]) == ["2 x KeyError: '…'"]


def test_names_keep_their_digits_and_only_the_first_line_counts():
    assert reasons.general("\n  utf8 and x2 can't\nTraceback ...") == "utf8 and x2 can't"
    assert reasons.commonest([""]) == ["1 x no reason given"]
    assert reasons.commonest(["word " * 100])[0].endswith("…")


def test_what_is_left_out_is_counted():
    given = ["a", "a", "b", "c", "d", "d", "d"]
    assert reasons.commonest(given, 2) == ["3 x d", "2 x a", "2 x 2 other reasons"]
    assert reasons.commonest([]) == []
