"""One model on several ranks, of one machine or many.

Alone it starts the other ranks' processes on this machine:

    python examples/llm_inference_distributed.py --tp_size 2

Under lamella-launch the ranks are those that mpirun or srun started, wherever they are; the script itself runs once:

    mpirun -n 2 lamella-launch python examples/llm_inference_distributed.py --tp_size 2
"""

import argparse
from pathlib import Path

from lamella import LLM, SamplingParams

MODEL = Path(__file__).parent / "demo_model" / "demo-4m"
PROMPTS = ["Once upon a time, a little fox named", "One sunny morning, Ben the bear"]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(MODEL), help="Directory that all machines see, or a hub id.")
parser.add_argument("--tp_size", type=int, default=2, help="Ranks that share each layer.")
parser.add_argument("--pp_size", type=int, default=1, help="Pipeline stages.")
args = parser.parse_args()

# No `if __name__ == "__main__"`: other ranks never run this script.
with LLM(args.model, tensor_parallel_size=args.tp_size, pipeline_parallel_size=args.pp_size) as llm:
    mapping = llm.engine.spec.model.mapping
    print(f"{mapping.world_size} ranks: tp_size {mapping.tp_size} x pp_size {mapping.pp_size}")
    for output in llm.generate(PROMPTS, SamplingParams(max_tokens=40)):
        print(f"{output.prompt}{output.outputs[0].text.rstrip()}\n")
