"""A Hugging Face repository to checkpoints/REPO_ID: the files that convert_hf_checkpoint.py and tokenizer.py read.

    python -m scripts.download Qwen/Qwen3-0.6B

Decisions to know:

- Only files at the top of the repository are downloaded: folders hold copies in other formats (original/, onnx/).
- Weights come as safetensors where the repository has them, else as .bin.
- The token is --hf_token, else HF_TOKEN, else the one that `hf auth login` saved.
- The Hub is asked first which files there are. `snapshot_download` alone would take a half-filled folder for the
  repository when the network is down.
- An interrupted download continues where it stopped.

Copy me: needs huggingface_hub.
"""

import argparse
import sys
from fnmatch import fnmatch
from pathlib import Path

CONFIG_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "LICENSE*",
)
SAFETENSORS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
BINARIES = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json")


def choose_files(files: list[str]) -> list[str]:
    """The names out of a repository's that are needed. Raises ValueError if there are no weights among them."""

    def matching(patterns):
        return [file for file in files if "/" not in file and any(fnmatch(file, pattern) for pattern in patterns)]

    weights = matching(SAFETENSORS) or matching(BINARIES)
    if not weights:
        raise ValueError("the repository has no weights named model*.safetensors or pytorch_model*.bin")
    return matching(CONFIG_FILES) + weights


def explain(error: Exception, repo_id: str) -> str:
    """What a user can do about an error of huggingface_hub, in one sentence."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):  # a subclass of the next
        page = f"https://huggingface.co/{repo_id}"
        return f"{repo_id} is gated: accept its terms at {page}, then give your token as --hf_token or HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no repository {repo_id}, or it is private and needs --hf_token or HF_TOKEN"
    if isinstance(error, errors.HFValidationError):
        return f"{repo_id!r} is not a repository's name, which looks like owner/name"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids the network; unset it to download"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"the Hub refuses the token (HTTP {status}); check --hf_token or HF_TOKEN"
        return f"the Hub answers {repo_id} with HTTP {status}; run this again later"
    return f"cannot reach the Hub ({type(error).__name__}); check the network and run this again to continue"


def download(repo_id: str, hf_token: str | None, out_dir) -> Path:
    """Download the repository and return its folder. Raises ValueError with a sentence for the user if that fails."""
    from huggingface_hub import HfApi, errors, snapshot_download

    # HTTPError is the HTTP client's: no connection, no answer in time, a broken proxy.
    failures = (errors.HTTPError, errors.HFValidationError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)
    folder = Path(out_dir) / repo_id
    try:
        info = HfApi().model_info(repo_id, token=hf_token or None, timeout=30)
        files = choose_files([file.rfilename for file in info.siblings])
        print(f"Downloading {len(files)} files to {folder}.")
        snapshot_download(repo_id, revision=info.sha, local_dir=folder, allow_patterns=files, token=hf_token or None)
    except failures as error:
        raise ValueError(explain(error, repo_id)) from error
    return folder


def main(args) -> None:
    folder = download(args.repo_id, args.hf_token, args.out_dir)
    print(f"Now convert it: python convert_hf_checkpoint.py --checkpoint_dir {folder}")


def parse_arguments():
    parser = argparse.ArgumentParser(description="Download a model from the Hugging Face Hub.")
    parser.add_argument("repo_id", metavar="REPO_ID", help="owner/name")
    parser.add_argument("--hf_token", help="default: HF_TOKEN, or what `hf auth login` saved")
    parser.add_argument("--out_dir", default="checkpoints", help="the files go to OUT_DIR/REPO_ID")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
