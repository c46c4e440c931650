"""The report says what was measured, nothing else, and neither loads nor runs anything whatever the data holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_trainer.publish import charts
from finetune_trainer.publish.report import (
    Curves,
    DataCounts,
    RenderedRow,
    ReportData,
    curves_from_metrics,
    library_versions,
    render_report,
    write_report,
)
from finetune_trainer.publish.visible_text import elided, pieces
from finetune_trainer.train.metrics_log import MetricsLog

BARE = ReportData(
    job_name="guard",
    model="org/model",
    created=datetime(2030, 1, 2, 3, 4, tzinfo=UTC),
    job_yaml="spec:\n  model_id: org/model\n",
)
FULL = replace(
    BARE,
    model_revision="0123abcd",
    steps=1200,
    train_loss=0.5,
    eval_loss=0.25,
    perplexity=math.exp(0.25),
    token_accuracy=0.875,
    best_checkpoint_step=1100,
    wall_seconds=754.0,
    resumed_from="s3://bucket/checkpoints/step-00000600",
    resumed_at_step=600,
    curves=Curves(
        loss=[(1, 2.0), (2, None), (3, 1.0)], eval_loss=[(2, 1.5), (3, 1.25)], learning_rate=[(1, 1e-4), (3, 0.0)]
    ),
    token_lengths=[10, 20, 20, 512],
    context_length=512,
    data=[
        DataCounts(name="train", source="s3://bucket/train.jsonl", rows=3000, tokens=1000, trainable_tokens=250),
        DataCounts(name="valid", rows=30, tokens=0, trainable_tokens=0, dropped_rows=0),
    ],
    rows=[RenderedRow(title="train.jsonl line 1", spans=[("question\n", False), ("answer</s>", True)], note="cut off")],
    versions=library_versions(),
    targets="q,v in 2 layers",
    layers=["model.layers.[0-1].self_attn.q_proj"],
    notices=["deepspeed is not acted on."],
)
"""With something in every field."""
VOID = {"meta", "br", "path", "use", "rect", "line"}


class Page(HTMLParser):
    """What a browser would make of the page: elements, attributes and texts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(("/".join(self.open), data))

    def text_in(self, tag: str) -> str:
        """All text inside elements of that kind."""
        return "".join(text for path, text in self.texts if tag in path.split("/"))

    @property
    def text(self) -> str:
        return "".join(text for path, text in self.texts if "style" not in path.split("/"))


def assert_inert(page: Page) -> None:
    """Nothing in the page runs, and nothing makes a browser ask the network."""
    assert page.open == []
    assert not {"script", "iframe", "object", "embed", "link", "img", "form", "base"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        if name in ("href", "xlink:href", "src", "action"):
            assert value.startswith("#"), value
        if name != "content":
            assert "url(" not in value.replace("url(#", ""), value
            assert "://" not in value, value
    assert "url(" not in page.text_in("style")
    assert "@import" not in page.text_in("style")


@pytest.mark.parametrize("data", [BARE, FULL], ids=["bare", "full"])
def test_the_page_is_inert_and_its_policy_forbids_the_network(data: ReportData) -> None:
    page = Page(render_report(data))
    assert_inert(page)
    policy = dict(page.attributes)  # the last of each name
    assert any("default-src 'none'" in value for name, value in page.attributes if name == "content")
    assert "src" not in policy


def test_everything_measured_is_shown() -> None:
    text = Page(render_report(FULL)).text
    for shown in (
        "guard",
        "org/model",
        "0123abcd",
        "2030-01-02 03:04 UTC",
        "0.5000",
        "0.2500",
        "1.28",
        "87.5%",
        "1,200",
        "step 1,100",
        "12 min 34 s",
        "Resumed at step 600 from s3://bucket/checkpoints/step-00000600",
        "3,000",
        "25.0%",
        "context_length 512",
        "Shortest 10, median 20, longest 512 tokens.",
        "deepspeed is not acted on.",
        "model_id: org/model",
        "train.jsonl line 1",
        "torch",
    ):
        assert shown in text


@pytest.mark.parametrize("missing", [None, float("nan"), float("inf")])
def test_what_was_not_measured_is_never_a_zero(missing: float | None) -> None:
    data = replace(
        BARE,
        train_loss=missing,
        eval_loss=missing,
        perplexity=missing,
        token_accuracy=missing,
        wall_seconds=missing,
        curves=Curves(loss=[(1, missing)], eval_loss=[(1, missing)]),
        data=[DataCounts(name="train")],
    )
    page = Page(render_report(data))
    # Five results, two curves and the row lengths.
    assert page.text.count("not measured") == 8
    assert page.text_in("td") == "—" * 8
    assert "0" not in page.text_in("dd")
    assert "svg" not in page.tags


def test_a_share_of_nothing_is_a_dash_and_a_counted_zero_is_a_zero() -> None:
    page = Page(render_report(replace(BARE, data=FULL.data)))
    cells = [text for path, text in page.texts if path.endswith("td")]
    # Row by row: train, valid.
    assert cells[:8] == ["3,000", "30", "1,000", "0", "250", "0", "25.0%", "—"]
    assert cells[10:12] == ["—", "0"]


HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></mark></main><h1>owned</h1>",
    "{{ 7 * 7 }}{% for x in range(9) %}x{% endfor %}{# gone #}",
    "<img src=x onerror=alert(1)>",
    "\"'><svg onload=alert(1)>",
    "<!-- ",
    "]]>&lt;&amp;",
    "</style><style>*{background:url(http://evil.example/)}",
    "</title><base href=http://evil.example/>",
    "\x00\x1b[31m\u202egnirts\u2066",
    "\ud800 lone surrogate",
]


def saying(text: str, value: Any) -> Any:
    """`value` with that text in place of each of its own, whatever it is."""
    if isinstance(value, str):
        return text
    if isinstance(value, Mapping):
        return {saying(text, key): saying(text, inner) for key, inner in list(value.items())[:1]}
    if isinstance(value, list | tuple):
        return type(value)(saying(text, inner) for inner in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: saying(text, getattr(value, field.name)) for field in fields(value)})
    return value


def test_something_is_in_every_field_that_hostile_text_is_tried_in() -> None:
    first, row = FULL.data[0], FULL.rows[0]
    assert [field.name for field in fields(FULL) if getattr(FULL, field.name) in (None, (), [], "")] == []
    assert first.source
    assert row.spans
    assert row.note


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_and_does_nothing(text: str, tmp_path: Path) -> None:
    data: ReportData = saying(text, replace(FULL, data=FULL.data[:1]))
    path = tmp_path / "report.html"
    write_report(path, data)
    page = Page(path.read_text(encoding="utf-8"))
    assert_inert(page)
    assert page.tags.count("h1") == 1
    assert page.tags.count("svg") == 3
    # Its own, and one in each picture.
    assert page.tags.count("style") == 4
    if text.isascii() and text.isprintable():
        assert page.text.count(text) >= 10
        # What is marked is the trained span and the legend.
        assert page.text_in("mark") == "Marked text" + text


# Surrogates come as U+D800; everything else that a page can hold must come through.
anything = st.text(max_size=60)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(spans=st.lists(st.tuples(anything, st.booleans()), max_size=4))
def test_any_row_reads_as_it_is_with_the_trained_part_marked(spans: list[tuple[str, bool]]) -> None:
    page = Page(render_report(replace(BARE, rows=[RenderedRow(title="row", spans=spans)])))
    assert_inert(page)
    shown = "".join(text for path, text in page.texts if "article" in path and "pre" in path)
    marked = "".join(text for path, text in page.texts if "article" in path and "mark" in path)
    assert shown == "".join(as_shown(text) for text, _ in spans)
    assert marked == "".join(as_shown(text) for text, trained in spans if trained)


def as_shown(text: str) -> str:
    return "".join(piece for kind, piece in pieces(text) if kind != "return")


@given(text=st.text())
def test_pieces_add_up_to_the_text(text: str) -> None:
    whole = "".join(chr(int(piece[2:], 16)) if kind == "code" else piece for kind, piece in pieces(text))
    assert whole == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("a b", [("text", "a b")]),
        (" a", [("space", " "), ("text", "a")]),
        ("a ", [("text", "a"), ("space", " ")]),
        ("a  b", [("text", "a"), ("space", "  "), ("text", "b")]),
        ("a \n b", [("text", "a"), ("space", " "), ("newline", "\n"), ("space", " "), ("text", "b")]),
        ("\r\n\t", [("return", "\r"), ("newline", "\n"), ("tab", "\t")]),
        ("a\u202eb", [("text", "a"), ("code", "U+202E"), ("text", "b")]),
        ("\ufeffa", [("code", "U+FEFF"), ("text", "a")]),
        ("👩\u200d💻", [("text", "👩\u200d💻")]),
    ],
)
def test_whitespace_that_is_easily_overlooked_is_marked(text: str, expected: list[tuple[str, str]]) -> None:
    assert pieces(text) == expected


def test_a_long_prompt_does_not_hide_the_trained_part() -> None:
    spans = [("p" * 50_000 + "prompt ends", False), ("safe</s>", True)]
    page = Page(render_report(replace(BARE, rows=[RenderedRow(title="row", spans=spans)])))
    assert "48,511 more characters" in page.text
    assert "prompt ends" in page.text
    assert page.text_in("mark").endswith("safe</s>")
    assert len(page.text) < 10_000


@given(spans=st.lists(st.tuples(st.text(max_size=9000), st.booleans()), max_size=5))
def test_what_is_left_out_is_counted(spans: list[tuple[str, bool]]) -> None:
    for (text, trained), span in zip(spans, elided(spans), strict=True):
        assert span.trained is trained
        assert len(span.head) + span.left_out + len(span.tail) == len(text)
        assert text.startswith(span.head)
        assert text.endswith(span.tail)


def test_the_page_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write_report(path, BARE)
    before = path.read_bytes()

    def full(self: Path, data: bytes) -> int:
        self.open("wb").close()
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        write_report(path, FULL)
    assert path.read_bytes() == before


def test_curves_come_back_from_the_metrics_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, resumed_at_step=None) as log:
        log.append(0, epoch=0.0, values={"eval_loss": 3.0})
        log.append(1, epoch=0.1, values={"loss": 2.0, "learning_rate": 1e-4})
        log.append(2, epoch=0.2, values={"loss": float("nan"), "learning_rate": 2e-4})
        log.append(2, epoch=0.2, values={"eval_loss": 1.5})
        log.append(2, epoch=0.2, values={"eval_loss": 1.25})
    path.write_bytes(path.read_bytes() + b'{"step": 3, "lo')
    curves = curves_from_metrics(path)
    assert curves.loss == [(1, 2.0), (2, None)]
    assert curves.eval_loss == [(0, 3.0), (2, 1.25)]
    assert curves.learning_rate == [(1, 1e-4), (2, 2e-4)]
    assert curves_from_metrics(tmp_path / "absent") == Curves([], [], [])


def test_a_long_curve_is_averaged_and_the_page_says_so() -> None:
    points = [(step, 1.0) for step in range(100_000)]
    text = render_report(replace(BARE, curves=Curves(loss=points)))
    assert "Each point is the mean of 100 logged steps." in text
    assert len(text) < 200_000


@pytest.mark.parametrize(
    "points",
    [[(5, 1.0)], [(1, None), (2, 1.0), (3, None)], [(0, 0.0), (1, 0.0)], [(1, 1e30), (2, 1e-30)]],
    ids=["one", "lone", "flat", "wide"],
)
def test_odd_curves_are_drawn(points: Sequence[tuple[int, float | None]]) -> None:
    page = Page(charts.line_chart("loss", [charts.Series("training", points)]))
    assert "svg" in page.tags
    assert page.open == []


@pytest.mark.parametrize("lengths", [[7], [7, 7, 7], range(1, 5000)], ids=["one", "equal", "many"])
def test_odd_lengths_are_drawn(lengths: Sequence[int]) -> None:
    page = Page(charts.histogram("lengths", lengths, limit=None, limit_label=""))
    assert "svg" in page.tags


def test_pictures_follow_the_colours_and_the_font_of_the_page() -> None:
    """A picture has no background, is drawn for a light page and inverted on a dark one."""
    svg = charts.line_chart("loss", FULL_SERIES, resumed_at_step=2)
    assert "<text" in svg
    assert "glyph" not in svg
    assert "fill: #ffffff" not in svg
    style = Page(render_report(FULL)).text_in("style")
    _, dark = style.split("@media (prefers-color-scheme: dark)")
    assert "figure svg { filter: invert(1) hue-rotate(180deg); }" in dark
    assert "figure svg text { font-family: inherit !important; }" in style


def test_a_picture_changes_nothing_of_the_page_around_it() -> None:
    """The style sheet that matplotlib writes holds for the whole page; what it sets is of pictures alone."""
    styles = [text for path, text in Page(render_report(FULL)).texts if path.endswith("svg/defs/style")]
    assert set(styles) == {"*{stroke-linejoin: round; stroke-linecap: butt}"}


def test_ids_of_two_pictures_in_one_page_are_different() -> None:
    page = Page(render_report(FULL))
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


FULL_SERIES = [charts.Series("training", FULL.curves.loss), charts.Series("evaluation", FULL.curves.eval_loss)]
