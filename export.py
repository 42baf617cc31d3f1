"""Export a trained model for deployment: uint8 images of any size in, class ids of the same size out.

    python export.py --ckpt out/semi/last.pt --out model.pt2
"""
import io
import json
import textwrap
from pathlib import Path

from common.args import Parser
from common.console import InputError, launch, write_atomically

import torch
import torch.nn.functional as F

import data
import model


def flags():
    p = Parser(__doc__)
    p.add_argument("--ckpt", required=True, metavar="FILE", help="last.pt or best.pt of a run, or a published file")
    p.add_argument("--out", required=True, metavar="FILE", help="model.pt2, for torch.export.load, or model.onnx")
    return p


class Predictor(torch.nn.Module):
    """RGB images (N,3,H,W) uint8 -> class ids (N,H,W) uint8, as predict.py has them. CPU only if input_scale < 1."""

    def __init__(self, seg):
        super().__init__()
        self.seg, self.multiple = seg, round(seg.stride / seg.input_scale)
        self.register_buffer("padding", torch.tensor(data.PADDING, dtype=torch.float32).view(3, 1, 1))

    def forward(self, images):
        height, width = images.shape[2:]
        steps = [torch.sym_max(1, (n + self.multiple - 2) // self.multiple) for n in (height, width)]
        full = [self.multiple * k + 1 for k in steps]  # see data.pad_to_stride
        x = F.pad(images - self.padding, (0, full[1] - width, 0, full[0] - height)) + self.padding
        if self.seg.input_scale != 1:
            x = data.resize(x.to(torch.uint8), [self.seg.stride * k + 1 for k in steps])
        logits = F.interpolate(self.seg(self.seg.normalise(x)), full, mode="bilinear", align_corners=True)
        ids = logits.argmax(1)  # (N,H,W), padded; a slice would specialise the graph on padding
        ids = F.pad(ids, (0, width - full[1], 0, height - full[0]))
        return torch.ops.aten._to_copy(ids, dtype=torch.uint8)  # .to() and arange() fix the device into the graph


def main(args):
    out = Path(args.out)
    if out.suffix not in (".pt2", ".onnx"):
        raise InputError(f"--out {out}: must end in .pt2 or .onnx")
    seg = model.load_segmenter(args.ckpt)
    predictor = Predictor(seg).eval().to(memory_format=torch.contiguous_format)
    shapes, example = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),), torch.zeros(2, 3, 203, 187).byte()
    facts = json.dumps({"classes": seg.classes, "palette": seg.palette})
    try:
        with torch.no_grad():
            program = torch.export.export(predictor, (example,), dynamic_shapes=shapes)
        if out.suffix == ".pt2":
            torch.export.save(program, file := io.BytesIO(), extra_files={"classes.json": facts})
        else:
            onnx = torch.onnx.export(program, verbose=False, input_names=["images"], output_names=["ids"])
            onnx.model.metadata_props["classes.json"] = facts
    except ImportError as e:
        raise InputError(f"--out {out}: {e.name} is not installed; pip install onnx onnxscript") from None
    except Exception as e:  # of any kind: the operators of some networks of timm cannot be exported
        raise InputError(f"--ckpt {args.ckpt}: its backbone cannot be exported to {out.suffix} ("
                         f"{textwrap.shorten(f'{type(e).__name__}: {e}', 99)}); train with another --backbone") from e
    write_atomically(out, lambda part: part.write_bytes(file.getbuffer()) if out.suffix == ".pt2" else onnx.save(part))
    print(f"{out}: images (N,3,H,W) uint8 -> class ids (N,H,W) uint8, {len(seg.classes)} classes")


if __name__ == "__main__":
    launch(main, flags)
