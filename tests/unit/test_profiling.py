"""`--profile`: a trace and a timeline of the chosen steps only, and the report's picture of them."""

import gzip
import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from siren_megatron.metrics import StageTimer
from siren_megatron.profiling import StepProfiler
from siren_megatron.report import read_timelines, render_report
from siren_megatron.report.timeline import timeline_path


def run_steps(save, rank, stages):
    timer = StageTimer()
    profiler = StepProfiler(save, (2,), rank, timer)
    for step in (1, 2, 3):
        profiler.begin(step)
        for stage in stages:
            with timer.stage(stage):
                torch.ones(8, 8) @ torch.ones(8, 8)
        profiler.end()
        timer.pop()


def test_chosen_steps_have_a_trace_and_a_timeline_a_rank(tmp_path):
    run_steps(tmp_path, 0, ("rollout", "train"))
    run_steps(tmp_path, 1, ("train",))
    traces = sorted(path.name for path in (tmp_path / "profile").glob("*.gz"))
    assert traces == ["step-2-rank-0.json.gz", "step-2-rank-1.json.gz"]
    with gzip.open(tmp_path / "profile" / traces[0], "rt") as file:
        assert any(event.get("name") == "aten::mm" for event in json.load(file)["traceEvents"])
    lines = read_timelines(tmp_path)
    assert [(line["step"], line["rank"]) for line in lines] == [(2, 0), (2, 1)]
    (_, start, end), (name, after, _) = lines[0]["stages"]
    assert lines[0]["started"] <= start <= end <= after and name == "train"


def test_the_report_draws_each_stage_where_it_was():
    stages = [("rollout", 100.0, 104.0), ("<train>", 104.0, 110.0)]
    lines = [{"step": 3, "rank": 0, "started": 100.0, "stages": stages}]
    html = render_report([], config={}, status="finished", paths={}, num_steps=3, timelines=lines)
    svg = html[html.index('<svg class="chart" viewBox="0 0 960') :]
    picture = ElementTree.fromstring(svg[: svg.index("</svg>") + 6])
    bars = [bar for bar in picture.iter("rect") if bar.find("title") is not None]
    left, width = ([float(bar.get(name)) for bar in bars] for name in ("x", "width"))
    assert left[0] + width[0] == pytest.approx(left[1], abs=0.2)
    assert width[1] / width[0] == pytest.approx(1.5, rel=0.01)
    assert [bar.find("title").text for bar in bars] == ["rollout: 4 s", "<train>: 6 s"]


def test_a_broken_timeline_is_named(tmp_path):
    (tmp_path / "profile").mkdir()
    path = timeline_path(tmp_path / "profile", 0)
    path.write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="timeline-rank-0.jsonl: not a timeline"):
        read_timelines(tmp_path)
    path.write_text('{"step": 1')  # killed in mid-write
    assert read_timelines(tmp_path) == []
