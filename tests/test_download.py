"""scripts/download.py without a network: which files it asks for, and one sentence for each way to fail."""

import runpy
import sys
from argparse import Namespace
from types import SimpleNamespace

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors

import scripts.download as download
from scripts.download import choose_files, main

SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
UNWANTED = ["README.md", "original/params.json", "onnx/model.safetensors", "model.gguf", "flax_model.msgpack"]
UNWANTED += ["training_args.bin", "consolidated.safetensors", "tf_model.h5"]


def http_error(kind, status):
    request = httpx2.Request("GET", "https://hub.invalid/api/models/owner/name")
    return kind(f"{status} Client Error.\n\nmore\nlines", response=httpx2.Response(status, request=request))


def hub(monkeypatch, files, list_error=None, file_error=None):
    """A Hub with these files, or that fails; returns the calls it gets."""
    calls = []

    def model_info(self, repo_id, **options):
        calls.append(("model_info", repo_id, options))
        if list_error:
            raise list_error
        return SimpleNamespace(sha="c0ffee", siblings=[SimpleNamespace(rfilename=file) for file in files])

    def snapshot_download(repo_id, **options):
        calls.append(("snapshot_download", repo_id, options))
        if file_error:
            raise file_error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_safetensors_are_chosen_before_bin():
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert choose_files(SMALL + UNWANTED + shards + ["pytorch_model.bin"]) == SMALL + shards
    assert choose_files(SMALL + UNWANTED + ["pytorch_model.bin"]) == SMALL + ["pytorch_model.bin"]
    with pytest.raises(ValueError, match="no weights"):
        choose_files(SMALL + UNWANTED)


def test_a_repository_comes_to_its_folder_and_the_next_command_is_named(monkeypatch, tmp_path, capsys):
    calls = hub(monkeypatch, [*SMALL, *UNWANTED, "model.safetensors"])
    main(Namespace(repo_id="owner/name", hf_token="hf_secret", out_dir=str(tmp_path)))
    (_, _, asked), (_, repo_id, options) = calls
    assert (repo_id, options["local_dir"]) == ("owner/name", tmp_path / "owner" / "name")
    assert options["allow_patterns"] == [*SMALL, "model.safetensors"]
    assert options["revision"] == "c0ffee"  # the listing and the files are of one commit
    assert options["token"] == asked["token"] == "hf_secret"
    out = capsys.readouterr().out
    assert out.startswith(f"Downloading {len(SMALL) + 1} files to {tmp_path / 'owner' / 'name'}.\n")
    assert out.endswith(f"python convert_hf_checkpoint.py --checkpoint_dir {tmp_path / 'owner' / 'name'}\n")
    assert "hf_secret" not in out


FAILURES = {
    "gated": (http_error(errors.GatedRepoError, 403), "owner/name is gated"),
    "missing": (http_error(errors.RepositoryNotFoundError, 404), "there is no repository owner/name"),
    "bad token": (http_error(errors.HfHubHTTPError, 401), "the Hub refuses the token (HTTP 401)"),
    "weak token": (http_error(errors.HfHubHTTPError, 403), "the Hub refuses the token (HTTP 403)"),
    "server": (http_error(errors.HfHubHTTPError, 503), "the Hub answers owner/name with HTTP 503"),
    "no network": (httpx2.ConnectError("Name or service not known"), "cannot reach the Hub (ConnectError)"),
    "no answer": (httpx2.ReadTimeout("timed out"), "cannot reach the Hub (ReadTimeout)"),
    "lost on the way": (errors.LocalEntryNotFoundError("no\nfile"), "cannot reach the Hub (LocalEntryNotFoundError)"),
    "half there": (errors.IncompleteSnapshotError("no", "x"), "cannot reach the Hub (IncompleteSnapshotError)"),
    "offline": (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE forbids the network"),
    "disk full": (OSError(28, "No space left on device"), "No space left on device"),
}


def run_command(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["download.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(download.__file__, run_name="__main__")
    return caught.value.code


@pytest.mark.parametrize("when", ["list_error", "file_error"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_is_one_sentence_and_exit_code_2(monkeypatch, tmp_path, capsys, failure, when):
    error, said = FAILURES[failure]
    hub(monkeypatch, [*SMALL, "model.safetensors"], **{when: error})
    assert run_command(monkeypatch, "owner/name", "--out_dir", str(tmp_path)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err and err.count("\n") == 1


def test_ctrl_c_ends_a_download_without_a_word(monkeypatch, tmp_path, capsys):
    hub(monkeypatch, [*SMALL, "model.safetensors"], list_error=KeyboardInterrupt())
    assert run_command(monkeypatch, "owner/name", "--out_dir", str(tmp_path)) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("repo_id", ["a/b/c", "../name", "owner/na me", ""])
def test_a_bad_name_is_refused_without_a_network(monkeypatch, tmp_path, capsys, repo_id):
    assert run_command(monkeypatch, repo_id, "--out_dir", str(tmp_path)) == 2
    assert capsys.readouterr().err == f"error: {repo_id!r} is not a repository's name, which looks like owner/name\n"
    assert not any(tmp_path.iterdir())


def test_a_folder_from_before_does_not_pass_for_a_download(monkeypatch, tmp_path, capsys):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert run_command(monkeypatch, "owner/name", "--out_dir", str(tmp_path)) == 2
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err
