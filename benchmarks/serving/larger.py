"""A larger LLM with random weights and an adapter for it: costs do not depend on what was learned.

python benchmarks/serving/larger.py --out build/larger
python benchmarks/serving/load.py --llm build/larger/llm --adapter build/larger/adapter ...
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from common import ADAPTER, LLM

from persona.encoders import UserEncoder
from persona.injection import PersonalizedLM


def main(args: argparse.Namespace) -> None:
    """Writes `llm` and `adapter`; the user encoder is the demo's, the projector is new."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(LLM)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        num_key_value_heads=args.width // 64,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    llm, out = LlamaForCausalLM(config), Path(args.out)
    llm.save_pretrained(out / "llm")
    tokenizer.save_pretrained(out / "llm")
    model = PersonalizedLM(
        llm, tokenizer, UserEncoder.from_pretrained(f"{ADAPTER}/encoder"), base_model=str(out / "llm")
    )
    model.save_pretrained(out / "adapter")
    print(f"wrote an LLM of {sum(p.numel() for p in llm.parameters()) / 1e6:.0f} M parameters to {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    main(parser.parse_args())
