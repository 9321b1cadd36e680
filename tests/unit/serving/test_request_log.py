"""What is read as a log of requests, from trimtab's own server and from others, and what is refused."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest

from trimtab.base.errors import InputError
from trimtab.serving import request_log

AT = 1700164800.0  # 2023-11-16T20:00:00Z
LINE = {"time": AT, "input_tokens": 512, "output_tokens": 87, "seconds": 1.5, "outcome": "stop"}


def jsonl(*lines: dict) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


LOGS = {
    "own.jsonl": jsonl(LINE),
    "iso.jsonl": jsonl({**LINE, "time": "2023-11-16T21:00:00+01:00"}),
    "no-zone.jsonl": jsonl({**LINE, "time": "2023-11-16 20:00:00"}),
    "litellm.jsonl": jsonl(
        {"id": "x", "startTime": AT, "endTime": AT + 1.5, "prompt_tokens": 512, "completion_tokens": 87}
    ),
    "own.csv": f"time,input_tokens,output_tokens,seconds\n{AT},512,87,1.5\n",
}
WITHOUT_SECONDS = {
    "short.jsonl": jsonl({name: value for name, value in LINE.items() if name != "seconds"}),
    "mooncake.jsonl": jsonl({"timestamp": AT * 1000, "input_length": 512, "output_length": 87, "hash_ids": [1, 2]}),
    "azure.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 20:00:00.0000000,512,87\n",
    "burst.csv": f"Timestamp,Model,Request tokens,Response tokens\n{AT},ChatGPT,512,87\n",
    "empty.csv": f"time,input_tokens,output_tokens,seconds\n{AT},512,87,\n",
}


@pytest.mark.parametrize("name", [*LOGS, *WITHOUT_SECONDS])
def test_the_same_request_in_every_form(name, tmp_path):
    (tmp_path / name).write_text((LOGS | WITHOUT_SECONDS)[name])
    found = request_log.read(str(tmp_path / name))
    assert (found.time.tolist(), found.input.tolist(), found.output.tolist()) == ([AT], [512], [87])
    seconds = found.seconds[0]
    assert math.isnan(seconds) if name in WITHOUT_SECONDS else seconds == pytest.approx(1.5)


def test_a_folder_of_logs_is_one_log_in_the_order_of_arrival(tmp_path):
    (tmp_path / "2.jsonl").write_text(jsonl(LINE, {**LINE, "time": AT + 5, "input_tokens": 1}))
    (tmp_path / "1.jsonl.gz").write_bytes(gzip.compress(jsonl({**LINE, "time": AT + 3, "input_tokens": 2}).encode()))
    (tmp_path / "notes.txt").write_text("no log")
    found = request_log.read(f"file://{tmp_path}")
    assert (found.time - AT).tolist() == [0, 3, 5] and found.input.tolist() == [512, 2, 1]


def test_the_newest_days_end_with_the_last_request(tmp_path):
    (tmp_path / "x.jsonl").write_text(jsonl(*({**LINE, "time": AT + 86400 * day} for day in (3, 0, 1.5, 2))))
    found = request_log.read(str(tmp_path))
    assert (found.newest(1.5).time - AT).tolist() == [86400 * day for day in (1.5, 2, 3)]
    assert len(found.newest(1000)) == 4


def test_a_line_that_is_still_being_written_is_passed_over(tmp_path):
    (tmp_path / "x.jsonl").write_text(jsonl(LINE) + '{"time": 17001')
    assert len(request_log.read(str(tmp_path))) == 1


BAD = {  # the second line of a log, and what is said of it
    "not JSON": ("{'time': 1}\n", "x.jsonl, line 2 is not JSON"),
    "no object": ("[1, 2]\n", "x.jsonl, line 2 is no object"),
    "no tokens": (jsonl({"time": AT}), "line 2: input_tokens: None is not valid; write a whole number, 0 or more"),
    "negative": (jsonl({**LINE, "output_tokens": -1}), "line 2: output_tokens: -1 is not valid; write a whole number"),
    "broken": (jsonl({**LINE, "input_tokens": 1.5}), "line 2: input_tokens: 1.5 is not valid; write a whole number"),
    "a truth": (jsonl({**LINE, "input_tokens": True}), "line 2: input_tokens: True is not valid"),
    "seconds": (jsonl({**LINE, "seconds": "soon"}), "line 2: seconds: 'soon' is not valid; write 0 or more seconds"),
    "time": (jsonl({**LINE, "time": "noon"}), "line 2: time: 'noon' is not valid; write seconds, or a moment as 2026"),
    "not a number": ('{"time": NaN, "input_tokens": 1, "output_tokens": 1}\n', "line 2: time: nan is not valid"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named(name, tmp_path):
    line, said = BAD[name]
    (tmp_path / "x.jsonl").write_text(jsonl(LINE) + line + jsonl(LINE))
    with pytest.raises(InputError) as error:
        request_log.read(str(tmp_path))
    assert said in str(error.value)


def test_an_end_before_its_beginning(tmp_path):
    line = {"startTime": AT, "endTime": AT - 1, "prompt_tokens": 5, "completion_tokens": 8}
    (tmp_path / "x.jsonl").write_text(jsonl(line))
    with pytest.raises(InputError, match=r"line 1: endTime: 1700164799.0 is before startTime"):
        request_log.read(str(tmp_path))


NO_LOGS = {
    "nothing": (None, "nothing' is no log and no folder of logs; write one that ends in .jsonl"),
    "x.log": ("", "does not end like a log; name it x.log.jsonl"),
    "x.jsonl": ("", "holds no request; record some with `trimtab serve --record FOLDER`"),
    "y.jsonl": (jsonl({"prompt": "hi", "time": 1}), "y.jsonl, line 1 has the fields prompt, time; write time, input"),
    "z.jsonl.gz": ("not compressed", "z.jsonl.gz cannot be read"),
}


@pytest.mark.parametrize("name", NO_LOGS)
def test_what_is_no_log(name, tmp_path):
    content, said = NO_LOGS[name]
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as error:
        request_log.read(str(tmp_path / name))
    assert said in str(error.value)


def test_logs_in_s3(s3_server, monkeypatch, tmp_path: Path):
    """A folder and a single log; what lies beside them is not read."""
    from trimtab.store.s3 import S3Back

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    back = S3Back(s3_server.bucket, "traffic")
    back.write("a.jsonl", jsonl(LINE).encode())
    back.write("b.jsonl", jsonl(LINE, LINE).encode())
    back.write("b.txt", b"no log")
    folder = f"s3://{s3_server.bucket}/traffic"
    assert [len(request_log.read(f"{folder}{end}")) for end in ("", "/", "/a.jsonl", "/b.jsonl")] == [3, 3, 1, 2]
    with pytest.raises(InputError, match=r"/c.jsonl' is no log and no folder of logs"):
        request_log.read(f"{folder}/c.jsonl")
