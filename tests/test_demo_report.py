"""Do the demo's sentences, tables and page say what the numbers say, and nothing else?"""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console

from lensbridge.demo.analyses import About, DemoResult
from lensbridge.demo.charts import attention_pattern, bar_chart, line_chart
from lensbridge.demo.command import as_json
from lensbridge.demo.formats import percent, plain, signed
from lensbridge.demo.heads import Head
from lensbridge.demo.heatmap import heat_map
from lensbridge.demo.induction import Ablation, Composition, HeadScores, InductionResult
from lensbridge.demo.ioi import Example, IoiResult
from lensbridge.demo.page import render_page
from lensbridge.demo.patching_sweep import SweepResult
from lensbridge.demo.report import heat_table, print_report
from lensbridge.demo.words import ablation_matters, induction_words, ioi_words, joined, listed, sweep_words

NAN = float("nan")


def induction_result() -> InductionResult:
    """A model of two layers of two heads in which L1H0 is an induction head and L0H1 its previous-token head."""
    pattern = torch.eye(6)
    return InductionResult(
        n_sequences=4,
        period=3,
        start=0,
        loss_by_position=torch.tensor([5.0, 5.0, 5.0, 1.0, 1.0]),
        first_loss=5.0,
        second_loss=1.0,
        scores=HeadScores(
            induction=torch.tensor([[0.02, 0.03], [0.91, 0.12]]),
            previous_token=torch.tensor([[0.1, 0.95], [0.2, 0.1]]),
            duplicate_token=torch.tensor([[0.3, 0.0], [0.0, 0.0]]),
        ),
        uniform_score=0.03,
        threshold=0.4,
        heads=[Head(1, 0)],
        strongest=Head(1, 0),
        ablations=[Ablation([Head(1, 0)], 4.5, [[Head(0, 0)], [Head(1, 1)]], [1.1, 1.0])],
        composition=Composition(Head(1, 0), Head(0, 1), 0.91, 0.05, Head(0, 0), 0.9),
        example_pattern=pattern,
        example_tokens=["a", "<b>", "c", "a", "<b>", "c"],
    )


def ioi_result() -> IoiResult:
    """The same model: L1H1 moves the name, L1H0 writes against it."""
    return IoiResult(
        n_prompts=40,
        n_unusable=0,
        accuracy=0.975,
        top_1=0.9,
        logit_difference=3.0,
        logit_difference_std=0.5,
        swapped_logit_difference=-2.9,
        head_attribution=torch.tensor([[0.0, 0.1], [-0.6, 3.2]]),
        component_labels=["embed", "0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out"],
        component_attribution=torch.tensor([0.0, 0.1, 0.2, 2.6, 0.1]),
        accumulated_labels=["0_pre", "0_mid", "1_pre", "1_mid", "final_post"],
        accumulated=torch.tensor([0.0, 0.1, 0.3, 2.9, 3.0]),
        explained=3.0,
        attention=torch.tensor([[[0.1, 0.1, 0.1], [0.1, 0.1, 0.1]], [[0.0, 0.5, 0.1], [0.8, 0.05, 0.05]]]),
        writers=[Head(1, 1), Head(0, 1)],
        opponents=[Head(1, 0)],
        examples=[Example("When Mary & John", "Mary", "John", " Mary", 3.1)],
    )


def sweep_result() -> SweepResult:
    """Layer 1 moves the answer from the giver (position 2) to the last position (4)."""
    return SweepResult(
        n_prompts=8,
        clean_prompt="Mary and John. John gave to",
        corrupted_prompt="Mary and John. Mary gave to",
        clean_difference=3.0,
        corrupted_difference=-3.0,
        resid=torch.tensor([[0.0, 0, 1, 0, 0], [0.0, 0, 0.9, 0.05, 0], [0.0, 0, 0, 0.2, 0.85], [0.0, 0, 0, 0, 1]]),
        resid_labels=["before layer 0", "before layer 1", "before layer 2", "after layer 2"],
        position_labels=["1st name", "2nd name", "giver (S2)", "gave", "to (END)"],
        giver_position=2,
        heads=torch.tensor([[0.0, 0.0], [0.7, -0.2], [0.05, 0.0]]),
        carriers=[Head(1, 0), Head(1, 1), Head(2, 0)],
    )


def demo_result() -> DemoResult:
    """All three, with a model name that must be escaped."""
    about = About("dir/<toy> & co", 2, 2, 16, 12345, "cpu", "float32", 0, False, 1.5)
    return DemoResult(about, induction_result(), ioi_result(), sweep_result())


# --- words -----------------------------------------------------------------------------------------------------------


def test_induction_words_of_a_model_with_the_circuit() -> None:
    words = induction_words(induction_result())
    assert words.verdict == "clear"
    text = " ".join(words.sentences)
    assert "L1H0 (0.91)" in words.headline and "5.00" in words.headline
    assert "1 head of 4" in text
    assert "the copying depends on this head" in text
    assert "+3.50" in text and "+0.05 (mean of 2 draws)" in text
    assert "from 0.91 to 0.05 (silencing L0H0 instead: 0.90): it builds on that head" in text


def test_induction_words_of_a_model_without_the_circuit() -> None:
    scores = HeadScores(torch.full((2, 2), 0.03), torch.full((2, 2), 0.1), torch.zeros(2, 2))
    ablation = Ablation([Head(0, 0)], 5.01, [[Head(1, 1)]], [5.0])
    result = replace(
        induction_result(), second_loss=5.0, scores=scores, heads=[], strongest=Head(0, 0), ablations=[ablation]
    )
    words = induction_words(result)
    assert words.verdict == "none"
    text = " ".join(words.sentences)
    assert "does not fall" in text
    assert "No head reaches an induction score of 0.40; the highest is L0H0 (0.03)" in text
    assert "No head attends to the previous token by 0.40" in text
    assert "does not hang on this head alone" in text
    assert "builds on" not in text, "there is no previous-token head to build on"


@pytest.mark.parametrize(
    ("second_copy", "said"),
    [([0.1] * 9, False), ([0.1] * 6 + [5.0] * 3, True), ([0.1] * 7 + [5.0] * 2, False), ([5.0] * 9, False)],
)
def test_copying_that_breaks_off_is_said_to(second_copy: list[float], said: bool) -> None:
    # Ten tokens twice: entries 0 to 8 score the first copy, 9 the first token of the second, 10 to 18 the rest.
    loss = torch.tensor([5.0] * 10 + second_copy)
    sentences = induction_words(replace(induction_result(), period=10, loss_by_position=loss)).sentences
    assert ("From position 17 to the end the loss is 5.00 again" in " ".join(sentences)) is said
    assert ("does not reach that far" in " ".join(sentences)) is said


@pytest.mark.parametrize(("second_loss", "said"), [(4.5, "falls only a little"), (2.0, "copies what it saw once")])
def test_a_fall_of_the_loss_without_heads_is_called_partial(second_loss: float, said: str) -> None:
    words = induction_words(replace(induction_result(), heads=[], second_loss=second_loss))
    assert words.verdict == "partial"
    assert said in words.sentences[0]


def test_a_head_that_hurts_no_more_than_others_is_not_called_special() -> None:
    ablation = Ablation([Head(1, 0)], 2.0, [[Head(0, 0)]], [1.8])
    assert not ablation_matters(ablation, 1.0)
    text = " ".join(induction_words(replace(induction_result(), ablations=[ablation])).sentences)
    assert "nothing special about this head" in text


def test_an_ablation_without_anything_to_compare_with_is_judged_by_itself() -> None:
    alone = Ablation([Head(0, 0)], 2.0, [], [])
    assert ablation_matters(alone, 1.0) and not ablation_matters(alone, 1.95)


def test_composition_that_does_not_matter_is_said_so() -> None:
    unmoved = Composition(Head(1, 0), Head(0, 1), 0.9, 0.85, None, NAN)
    text = induction_words(replace(induction_result(), composition=unmoved)).sentences[-1]
    assert "does not depend on that head alone" in text and "nan" not in text


def test_ioi_words_of_a_model_with_the_circuit() -> None:
    words = ioi_words(ioi_result())
    assert words.verdict == "clear"
    text = " ".join(words.sentences)
    assert "98%" in words.headline and "L1H1 (+3.20)" in words.headline
    assert "the answer follows who is named twice" in text
    assert "L1H1 (0.80) looks at the indirect object, as name movers do." in text
    assert "Heads that write as much against it: L1H0 (-0.60)" in text
    assert "1_attn_out adds most (+2.60)" in text
    assert "approximate" not in text


@pytest.mark.parametrize(("accuracy", "verdict"), [(0.8, "partial"), (0.55, "none"), (0.1, "none")])
def test_ioi_verdict_follows_the_accuracy(accuracy: float, verdict: str) -> None:
    words = ioi_words(replace(ioi_result(), accuracy=accuracy))
    assert words.verdict == verdict
    assert f"{accuracy:.0%}" in words.headline


def test_ioi_words_admit_an_inexact_decomposition_and_missing_roles() -> None:
    result = replace(
        ioi_result(),
        explained=2.0,
        attention=torch.zeros(2, 2, 3),
        opponents=[],
        swapped_logit_difference=1.0,
    )
    text = " ".join(ioi_words(result).sentences)
    assert "the decomposition is only approximate" in text
    assert "L1H1 looks at none of the names" in text
    assert "No head writes 0.30 nats or more against it" in text
    assert "does not follow who is named twice" in text


def test_ioi_words_tell_heads_by_whom_they_look_at() -> None:
    attention = torch.tensor([[[0.1, 0.1, 0.1], [0.2, 0.1, 0.9]], [[0.0, 0.4, 0.6], [0.0, 0.5, 0.1]]])
    writes = torch.tensor([[0.0, 1.0], [0.9, 0.8]])
    heads = [Head(0, 1), Head(1, 0), Head(1, 1)]
    text = " ".join(
        ioi_words(replace(ioi_result(), attention=attention, head_attribution=writes, writers=heads)).sentences
    )
    assert "L0H1 (0.90) and L1H0 (0.60) look at the giver" in text
    assert "L1H1 (0.50) looks at the first mention of the subject" in text
    assert "name movers" not in text


def test_sweep_words_name_the_layer_that_moves_the_answer() -> None:
    words = sweep_words(sweep_result())
    assert words.verdict == "clear"
    assert words.headline == "Layer 1 moves the answer from the giver to the last position."
    text = " ".join(words.sentences)
    assert "'gave': 20% before layer 2" in text
    assert "70% (L1H0) and -20% (L1H1)" in text
    later = sweep_result().resid[[0, 0, 1, 2]]
    assert sweep_words(replace(sweep_result(), resid=later)).headline.startswith("Layer 2 moves")


def test_sweep_words_when_several_layers_or_no_position_hold_the_answer() -> None:
    gradual = torch.tensor([[0.0, 0, 1, 0, 0], [0.0, 0, 0.4, 0, 0.3], [0.0, 0, 0.2, 0, 0.4], [0.0, 0, 0, 0, 1]])
    assert sweep_words(replace(sweep_result(), resid=gradual)).headline.startswith("Layers 0 to 2 move")
    spread = torch.full((4, 5), 0.05)
    words = sweep_words(replace(sweep_result(), resid=spread, heads=torch.zeros(3, 2)))
    assert words.verdict == "partial" and "spread" in words.headline
    text = " ".join(words.sentences)
    assert "No position between" in text and "No single head" in text


def test_sweep_words_refuse_to_divide_by_almost_nothing() -> None:
    words = sweep_words(replace(sweep_result(), clean_difference=0.2, corrupted_difference=0.1))
    assert words.verdict == "none"
    assert "too close (below 0.5 nats)" in words.sentences[0]


def test_small_words() -> None:
    assert joined(["a"]) == "a" and joined(["a", "b", "c"]) == "a, b and c"
    table = torch.tensor([[0.9, 0.8, 0.7]])
    heads = [Head(0, number) for number in range(3)]
    assert listed(table, heads, limit=1) == "L0H0 (0.90) and 2 more"
    assert listed(table, []) == "no head"
    assert signed(-0.001) == "+0.00" and plain(-0.001) == "0.00" and percent(-0.001) == "0%"


# --- pictures and page -----------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page loads or links to, its visible text, and whether its tags are balanced."""

    VOID = frozenset({"meta", "br", "rect", "line", "circle", "polyline"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_and_loads_nothing() -> None:
    html = render_page(demo_result(), "1.2.3")
    page = Page(html)
    assert page.open == []
    assert sorted(page.references) == ["#induction", "#ioi", "#patching"]
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "//" not in html.replace("<!DOCTYPE html>", "") and "url(" not in html and "@import" not in html
    assert "prefers-color-scheme: dark" in html and "default-src 'none'" in html


def test_the_page_says_what_the_words_say_and_escapes_names() -> None:
    result = demo_result()
    html = render_page(result, "1.2.3")
    text = "".join(Page(html).text)
    assert result.ioi is not None and result.sweep is not None
    for words in (induction_words(result.induction), ioi_words(result.ioi), sweep_words(result.sweep)):
        assert words.headline in text
        assert all(sentence in text for sentence in words.sentences)
    assert "dir/<toy> & co" in text and "<toy>" not in html
    assert "1.2.3" in text and "giver (S2)" in text


def test_the_page_of_a_model_that_takes_only_the_first_analysis() -> None:
    page = Page(render_page(replace(demo_result(), ioi=None, sweep=None, left_out="No tokenizer & so on."), "1"))
    assert page.references == ["#induction"]
    assert "No tokenizer & so on." in "".join(page.text)


def test_a_sweep_without_meaning_is_drawn_without_tables() -> None:
    unmeasured = replace(sweep_result(), clean_difference=0.0, corrupted_difference=0.0, resid=torch.full((4, 5), NAN))
    html = render_page(replace(demo_result(), sweep=unmeasured), "1")
    assert "too close" in html and "nan" not in "".join(Page(html).text)


def test_heat_map_colours_and_labels() -> None:
    table = torch.tensor([[1.0, -2.0], [0.0, NAN]])
    html = heat_map(table, ["L0", "L1"], ["H<0>", "H1"], caption="a & b", kind="signed", show=signed)
    assert 'class="pos" style="--t:50%" data-tip="L0, H&lt;0&gt;: +1.00"' in html
    assert 'class="neg strong" style="--t:100%" data-tip="L0, H1: -2.00"' in html
    assert 'class="nan"' in html and "not measured" in html
    assert "a &amp; b" in html
    assert "<span>-2.00</span><span>+0.00</span><span>+2.00</span>" in html
    score = heat_map(torch.tensor([[0.25]]), ["L0"], ["H0"], caption="", kind="score", limit=1.0)
    assert 'class="score" style="--t:25%"' in score and "<span>0.00</span><span>1.00</span>" in score


def test_heat_map_of_nothing_but_zeros_and_a_wide_one() -> None:
    zeros = heat_map(torch.zeros(1, 2), ["r"], ["a", "b"], caption="", kind="signed")
    assert zeros.count("--t:0%") == 2
    wide = heat_map(torch.zeros(1, 30), ["r"], [str(n) for n in range(30)], caption="", kind="signed")
    assert "heat dense" in wide and "heat dense" not in zeros


def test_heat_map_refuses_labels_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 2\) with 1 row labels and 3 column labels"):
        heat_map(torch.zeros(1, 2), ["r"], ["a", "b", "c"], caption="", kind="signed")


def test_charts_put_values_where_they_belong() -> None:
    chart = line_chart([0.0, 4.0], ["a", "b"], caption="c", y_title="y", x_title="x", marked_from=1, marked_name="two")
    heights = [float(y) for y in re.findall(r'<circle [^>]*cy="([\d.]+)"', chart)]
    assert heights[0] > heights[1], "a larger value stands higher, so nearer to the top"
    assert "b: 4.00" in chart and ">two<" in chart
    bars = bar_chart([1.0, -0.5], ["up", "down"], caption="c", y_title="y", x_title="x")
    sizes = [float(height) for height in re.findall(r'class="bar \w+"[^>]*height="([\d.]+)"', bars)]
    assert sizes[0] == pytest.approx(2 * sizes[1], abs=0.2)
    assert 'class="bar pos"' in bars and 'class="bar neg"' in bars


def test_attention_pattern_draws_only_what_is_attended() -> None:
    drawn = attention_pattern(torch.tensor([[1.0, 0.0], [0.01, 0.99]]), ["<s>", "x"], caption="c")
    assert drawn.count('class="att"') == 2
    assert "1 x to 1 x: 0.99" in drawn and "0 &lt;s&gt; to 0" in drawn


# --- terminal and JSON -----------------------------------------------------------------------------------------------


def printed(result: DemoResult, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    print_report(result, console)
    return console.export_text()


def test_the_terminal_shows_words_and_tables() -> None:
    text = printed(demo_result(), 120)
    for expected in (
        "Induction heads: L1H0 (0.91)",
        "+3.500",
        "2 draws",
        "looks at IO",
        "before layer 1",
        "70%",
        "+3.20",
    ):
        assert expected in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_terminal_too_narrow_for_a_table_gets_a_list() -> None:
    assert heat_table("t", torch.zeros(2, 9), ["a", "b"], ["column"] * 9, signed, width=40) is None
    deep = HeadScores(*[torch.rand(40, 2, generator=torch.Generator().manual_seed(0)) for _ in range(3)])
    text = printed(replace(demo_result(), induction=replace(induction_result(), scores=deep)), 100)
    assert "Strongest heads" in text and "duplicate token" in text


def test_the_sweep_points_to_the_page_where_the_terminal_is_too_narrow() -> None:
    assert "see the page" in printed(demo_result(), 40)
    assert "see the page" not in printed(demo_result(), 80)


def test_left_out_is_printed() -> None:
    assert "no tokenizer" in printed(
        replace(demo_result(), ioi=None, sweep=None, left_out="There is no tokenizer."), 80
    )


def test_json_holds_every_number_and_the_words() -> None:
    unmeasured = replace(sweep_result(), heads=torch.full((3, 2), NAN))
    data = json.loads(json.dumps(as_json(replace(demo_result(), sweep=unmeasured), "1.2.3"), allow_nan=False))
    assert data["induction"]["heads"] == ["L1H0"]
    assert data["induction"]["ablations"][0]["controls"] == [["L0H0"], ["L1H1"]]
    assert data["ioi"]["head_attribution"][1][1] == pytest.approx(3.2)
    assert data["sweep"]["heads"] == [[None, None]] * 3
    assert data["about"]["model"] == "dir/<toy> & co"
    assert data["lensbridge"] == "1.2.3"
    assert data["words"]["induction"]["verdict"] == "clear" and data["words"]["ioi"]["sentences"]
