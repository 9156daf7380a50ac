"""runtime.py: where the output of a command goes."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import runtime


def test_a_file_is_written_where_a_link_points(tmp_path):
    (tmp_path / "real").write_text("keep")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("folder/new")
    for name in ("link", "dangling"):
        runtime.check_target(tmp_path / name)
        runtime.write_json(tmp_path / name, {"a": 1})
        assert (tmp_path / name).is_symlink()
    assert json.loads((tmp_path / "real").read_text()) == json.loads((tmp_path / "folder/new").read_text()) == {"a": 1}


def test_a_fifo_gets_the_bytes_and_stays_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    runtime.check_target(tmp_path / "pipe")
    with ThreadPoolExecutor() as pool:
        read = pool.submit((tmp_path / "pipe").read_text)
        runtime.write_json(tmp_path / "pipe", [1, float("nan"), {"x": float("-inf")}])
        assert json.loads(read.result(10)) == [1, None, {"x": None}]
    assert (tmp_path / "pipe").is_fifo()


def test_an_open_stream_is_written_to_by_its_name(tmp_path):
    """A program's stdout may be a file, with text in it already."""
    code = "import runtime; print('text', flush=True); runtime.write_json('/dev/stdout', [1])"
    with open(tmp_path / "out", "w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_text().split() == ["text", "[", "1", "]"]


def test_what_the_command_needs_otherwise_is_not_written_over(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to("model.pth")
    monkeypatch.chdir(tmp_path)
    for name in ("model.pth", "link", tmp_path / "model.pth", "./folder/../model.pth"):
        with pytest.raises(ValueError, match="would be written over"):
            runtime.check_target(name, None, "prompts.txt", tmp_path / "model.pth")
    runtime.check_target("other.pth", None, "model.pth")
    runtime.check_target("/dev/null", "/dev/null")


def test_nothing_is_said_where_stderr_is_closed(tmp_path):
    code = "import runtime; runtime.run_command(lambda words: runtime.say(*words) or print('text', {0}), ['a figure'])"
    code = code.format("runtime.rank_and_count()")
    environment = os.environ | {"RANK": "", "WORLD_SIZE": ""}
    command = f'"{sys.executable}" -c "{code}" 2>&-'
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, env=environment, text=True, check=True)
    assert done.stdout == "text (0, 1)\n"


@pytest.mark.parametrize("write", ["torch.save(Long(), file)", "file.touch(); print(flush=True); time.sleep(60)"])
def test_sigterm_leaves_nothing_half_written(tmp_path, write):
    code = f"""if True:
        import sys, time, torch, runtime
        class Long:
            def __reduce__(self):  # while the zip writer has its file open
                print(flush=True)
                time.sleep(60)
        with runtime.written_in_place(sys.argv[1]) as file:
            {write}"""
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "model.pth"], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
        process.terminate()
        assert process.wait(30) == 143
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flush", [True, False])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_nothing_is_said_where_the_output_is_read_no_more(stream, flush):
    code = f"""if True:
        import sys, runtime
        sys.stdin.read()  # until the other end of the pipe is closed
        runtime.run_command(lambda to: print("text", file=to, flush={flush}), sys.{stream})"""
    read, write = os.pipe()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: write}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        os.close(read)
        os.close(write)
        said = process.communicate()
    assert (process.returncode, *said) == (141, *((None, b"") if stream == "stdout" else (b"", None)))


@pytest.mark.parametrize("name", ["folder", "file/below", "loop"])
def test_what_cannot_be_written_is_refused_beforehand(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="; give"):
        runtime.check_target(tmp_path / name)
