"""Export a trained net: uint8 pictures of any size in, class ids at the pictures' own size out.

    python export.py --ckpt out/semi/last.pt --out net.pt2
"""
import io
import json
from pathlib import Path

import torch
import torch.nn.functional as F

import cli
import data
import model

ENDINGS = {".pt2": "torch.export", ".onnx": "ONNX"}


def flags():
    p = cli.Parser(__doc__)
    p.add_argument("--ckpt", required=True, metavar="FILE", help="a training's last.pt or best.pt, or a published file")
    p.add_argument("--out", required=True, metavar="FILE", help="net.pt2, for torch.export.load, or net.onnx")
    return p


class Predictor(torch.nn.Module):
    """Pictures (N,3,H,W) uint8, RGB -> the class ids (N,H,W) uint8 that eval.py predicts for them in float32.

    Where --input-scale shrinks pictures it runs on the CPU only: CUDA cannot shrink uint8 (see data.resize).
    """

    def __init__(self, seg, stride, input_scale):
        super().__init__()
        self.seg, self.multiple, self.shrinks = seg, round(stride / input_scale), input_scale != 1
        self.stride = stride
        self.register_buffer("padding", torch.tensor(data.PADDING, dtype=torch.float32).view(3, 1, 1))

    def forward(self, pictures):
        height, width = pictures.shape[2:]
        steps = [(n + self.multiple - 2) // self.multiple for n in (height, width)]
        full = [self.multiple * k + 1 for k in steps]  # see data.for_net
        x = F.pad(pictures - self.padding, (0, full[1] - width, 0, full[0] - height)) + self.padding
        if self.shrinks:
            x = data.resize(x.to(torch.uint8), [self.stride * k + 1 for k in steps])
        logits = self.seg(self.seg.normalise(x))
        logits = F.interpolate(logits, full, mode="bilinear", align_corners=True)
        ids = logits.argmax(1).to(torch.uint8)  # (N,H,W), padded; a slice would fix whether there is padding
        return ids.index_select(1, torch.arange(height, device=ids.device)).index_select(
            2, torch.arange(width, device=ids.device))


def main(args):
    out = Path(args.out)
    if out.suffix not in ENDINGS or not out.parent.is_dir():
        raise cli.InputError(f"--out {out}: must end in {' or '.join(ENDINGS)}, in a folder that is there")
    checkpoint = model.read_checkpoint(args.ckpt, "--ckpt")
    net = Predictor(model.build_segmenter(checkpoint, args.ckpt), checkpoint["args"]["stride"],
                    checkpoint["args"].get("input_scale", 1)).eval().to(memory_format=torch.contiguous_format)
    dynamic = torch.export.Dim.DYNAMIC
    shapes, example = ({0: dynamic, 2: dynamic, 3: dynamic},), torch.zeros(2, 3, 203, 187, dtype=torch.uint8)
    with torch.no_grad():
        program = torch.export.export(net, (example,), dynamic_shapes=shapes)
    facts = json.dumps({"classes": checkpoint["classes"], "palette": checkpoint["args"].get("palette")})
    if out.suffix == ".pt2":
        file = io.BytesIO()
        torch.export.save(program, file, extra_files={"classes.json": facts})
        cli.replace(out, lambda part: part.write_bytes(file.getbuffer()))
    else:
        try:
            onnx = torch.onnx.export(program, verbose=False, input_names=["pictures"], output_names=["ids"])
        except ImportError as e:
            raise cli.InputError(f"--out {out}: {e.name} is not installed; pip install onnx onnxscript") from None
        onnx.model.metadata_props["classes.json"] = facts
        cli.replace(out, onnx.save)
    print(f"{out}: {ENDINGS[out.suffix]}, pictures (N,3,H,W) uint8 -> ids (N,H,W) uint8, "
          f"{len(checkpoint['classes'])} classes")


if __name__ == "__main__":
    cli.launch(main, flags)
