"""A complete checkpoint with random weights, small enough for any machine, in the released Bernini-R layout."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .checkpoint import save_renderer, write_json
from .renderer.config import RendererConfig
from .renderer.model import Renderer

TEXT_DIM = 32
RENDERER = RendererConfig(
    num_attention_heads=2, attention_head_dim=32, num_layers=2, ffn_dim=128, text_dim=TEXT_DIM, freq_dim=64
)
VAE: dict[str, Any] = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1}
TEXT: dict[str, Any] = {"d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "solver_order": 2,
    "solver_type": "bh2",
    "predict_x0": True,
    "final_sigmas_type": "zero",
    "lower_order_final": True,
}
ROOT = {
    "model_type": "bernini_renderer",
    "wan22_base": "",
    "skip_transformer_1": False,
    "skip_transformer_2": False,
    "switch_dit_boundary": 0.875,
    "max_sequence_length": 512,
    "shift": 3.0,
    "use_unipc": True,
    "use_src_id_rotary_emb": True,
}


def byte_tokenizer(
    specials: Sequence[str] = ("<pad>", "</s>", "<unk>"), *, ends: bool = True, words: Sequence[str] = (),
    length: int = 512,
) -> Any:  # fmt: skip
    """A tokenizer of single bytes: any text, no training, no file to fetch.

    Args:
        specials: special tokens (UMT5's by default); the first pads, the second ends a text, the third is unknown.
        ends: whether encoding a text puts the second behind it.
        words: texts whose words become tokens of their own, the first of each with and without a space before it.
            What is not among them remains bytes.
        length: of the longest text, in tokens; only stated, nothing is cut here.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pad, end, unknown = specials[:3]
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted(split.alphabet())
    whole = {piece for text in words for spoken in (text, f" {text}") for piece, _ in split.pre_tokenize_str(spoken)}
    vocab = {token: number for number, token in enumerate([*specials, *letters, *sorted(whole - {*letters})])}
    # Whole words are looked up before any merge, so none is needed.
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token=unknown, ignore_merges=bool(words)))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=end, unk_token=unknown, model_max_length=length,
        additional_special_tokens=list(specials[3:]),
    )  # fmt: skip


def write_toy(folder: str | Path, *, seed: int = 0) -> Path:
    """Writes the checkpoint; the folder appears complete or not at all.

    Raises:
        FileExistsError: ``folder`` exists and is not empty.
    """
    with new_folder(folder) as work, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for expert in ("transformer", "transformer_2"):
            save_renderer(Renderer(RENDERER), work / expert)
        write_common_parts(work, "")
        write_json(work / "config.json", ROOT)
    return Path(folder)


def write_common_parts(
    work: Path, prefix: str, *, dim: int = TEXT_DIM, vae: Mapping[str, Any] = VAE, text: Mapping[str, Any] = TEXT,
    tokenizer: Any = None,
) -> None:  # fmt: skip
    """VAE, text encoder, tokenizer and scheduler; the text parts' folders begin with ``prefix``.

    Args:
        dim: width of the text encoder.
        vae, text: arguments of ``AutoencoderKLWan`` and of ``UMT5Config``.
        tokenizer: the text encoder's; by default one of bytes.
    """
    from diffusers import AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = tokenizer or byte_tokenizer()
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=dim, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **text
    )
    AutoencoderKLWan(**vae).save_pretrained(work / "vae")
    UMT5EncoderModel(config).save_pretrained(work / f"{prefix}text_encoder")
    tokenizer.save_pretrained(work / f"{prefix}tokenizer")
    (work / "scheduler").mkdir()
    write_json(work / "scheduler" / "scheduler_config.json", SCHEDULER)


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into; under its real name it appears complete or not at all.

    Raises:
        FileExistsError: ``folder`` exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already; choose a new folder or remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield work
        work.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        work.rename(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
