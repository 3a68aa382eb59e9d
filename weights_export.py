#!/usr/bin/env python3
"""weights_export.py: the published weights of Wan2.1 and OSP-Next into files osp reads, text in, video out.

  python3 weights_export.py dit   OSP-Next/ -o osp.safetensors --dtype bf16      weights: one file, spec names, config
  python3 weights_export.py lora  osp.safetensors --lora adapter/ -o tuned.safetensors        W + alpha/r · B·A
  python3 weights_export.py text  "a red fox runs" -o fox.safetensors --encoder Wan2.1-Diffusers/            UMT5-XXL
  osp sample -w osp.safetensors --text fox.safetensors -o latent.safetensors --frames 81 --height 720 --width 1280
  python3 weights_export.py video latent.safetensors -o fox.mp4 --vae Wan2.1-Diffusers/                  Wan's decoder
  python3 weights_export.py test [--all]

dit and lora need numpy only; .pth files, text and video also ask for torch, transformers or diffusers when used.
No tensor is ever whole in memory: files are read and written some rows at a time, so 14B weights pass through a laptop.
A file is written beside its target and renamed when complete. Errors are one line on stderr and exit status 2.

Sections: 1 errors and output, 2 numbers (bf16, HiF8), 3 tensors on disk, 4 names and shapes, 5 writing, 6 commands, 7 tests
"""
import argparse, contextlib, json, math, os, re, shutil, signal, struct, subprocess, sys, time, zipfile, zlib
import numpy as np

CHUNK = 1 << 22            # elements handled at a time: 16 MB in float32


# ---------------------------------------------------------------------------------------------- 1. errors and output
class Error(Exception):
    """What, where, what to do: main() prints it as one line and exits 2."""


def need(*packages):
    """Import packages that only one command needs."""
    try:
        return [__import__(p) for p in packages]
    except ImportError as e:
        extra = ["ftfy", "sentencepiece"] if "transformers" in packages else []
        install = "python3 -m pip install " + " ".join([*packages, *extra])
        raise Error(f"package {e.name} is missing (torch takes gigabytes): {install}")


@contextlib.contextmanager
def new_file(path):
    """A file or, given a path ending in /, a folder under a temporary name that becomes `path` if all goes well."""
    target = path.rstrip("/")
    temp = f"{target}.{os.getpid()}.tmp"
    try:
        if os.path.isdir(target) != path.endswith("/") and os.path.exists(target):
            raise Error(f"{path}: a file and a folder of one name; choose another -o")
        if path.endswith("/"):
            os.mkdir(temp)
            yield temp
            os.path.isdir(target) and os.rmdir(target)          # only an empty one may be replaced
        else:
            with open(temp, "wb") as f:
                yield f
        os.replace(temp, target)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.unlink(temp)
        raise


class Progress:
    """[#######......] 43%  blocks.17.ffn.0.weight  12 s left: on stderr, and only where someone watches."""
    def __init__(self, total):
        self.total, self.done, self.start, self.last = max(total, 1), 0, time.time(), 0.0

    def add(self, amount, label):
        self.done += amount
        now, part = time.time(), self.done / self.total
        if sys.stderr.isatty() and (now - self.last > 0.1 or part >= 1):
            self.last = now
            left = (now - self.start) * (1 - part) / max(part, 1e-9)
            bar = "#" * int(30 * part) + "." * (30 - int(30 * part))
            print(f"\r[{bar}] {part:4.0%}  {label[:44]:44}  {left:4.0f} s left\033[K", end="", file=sys.stderr, flush=True)
            if part >= 1:
                print(file=sys.stderr)


# -------------------------------------------------------------------------------- 2. numbers: bf16, HiF8 (spec §6)
RAW = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "U8": np.dtype("u1")}


def hif8_value(code):
    """The number a byte stands for: sign, prefix code of the field widths, sign and magnitude of E, mantissa."""
    sign, c = (-1.0 if code & 0x80 else 1.0), code & 0x7F
    if c == 0:    return math.nan if code == 0x80 else 0.0
    if c == 0x6F: return sign * math.inf
    if c < 0x08:  return sign * 2.0 ** (c - 23)
    width, m = (4, 1) if c >= 0x60 else (3, 2) if c >= 0x40 else (2, 3) if c >= 0x20 else (1, 3) if c >= 0x10 else (0, 3)
    field, mantissa = c >> m & (1 << width) - 1, 1 + (c & (1 << m) - 1) / (1 << m)
    top = 1 << width >> 1                                        # the field's first bit is E's sign; |E| leads with 1
    E = 0 if width == 0 else (-1 if field & top else 1) * (top | field & top - 1)
    return sign * 2.0 ** E * mantissa


def hif8_round(x):
    """Round half away from zero to 3, 2, 1 or 0 mantissa bits as |E| grows, saturating to Inf at 1.25·2^15."""
    a = abs(x)
    if a < 2.0 ** -23: return 0.0
    if a >= 40960:     return math.copysign(math.inf, x)
    E = max(math.frexp(a)[1] - 1, -22)
    m = 3 if abs(E) <= 3 else 2 if abs(E) <= 7 else 1 if abs(E) <= 15 else 0
    return math.copysign(math.floor(a * 2.0 ** (m - E) + 0.5) * 2.0 ** (E - m), x)


# Rounding looks at sign, exponent, three mantissa bits and the one below them: the code is a function of the 13 top
# bits of a float32 (NaN apart), so encoding a tensor is one look-up per element, exact.
HIF8_VALUE = np.array([hif8_value(c) for c in range(256)], np.float32)
_CODE = {hif8_value(c): c for c in range(256) if c != 0x80}
HIF8_CODE = np.array([0x80 if x != x else _CODE[hif8_round(x)]
                      for x in (np.arange(8192, dtype=np.uint32) << 19).view(np.float32).tolist()], np.uint8)


def hif8_encode(x):
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    code = HIF8_CODE[u >> 19]
    code[(u & 0x7FFFFFFF) > 0x7F800000] = 0x80
    return code


def hif8_scale(amax):
    """k = 15 / max|x| in float32: the file holds hif8(x·k) and k; a reader divides."""
    return np.float32(15) / np.maximum(np.float32(amax), np.float32(1e-8))


def to_f32(raw, dtype, scale=None):
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return HIF8_VALUE[raw] / scale if dtype == "U8" else raw.astype(np.float32, copy=False)


def from_f32(x, dtype, scale=None):
    if dtype == "BF16":                                          # round to nearest even
        u = np.ascontiguousarray(x).view(np.uint32)
        nan = (u & 0x7FFFFFFF) > 0x7F800000
        return np.where(nan, u >> 16 | 0x40, (u + (0x7FFF + (u >> 16 & 1))) >> 16).astype(np.uint16)
    return hif8_encode(x * scale) if dtype == "U8" else x.astype(RAW[dtype], copy=False)


# --------------------------------------------------------------------------------------------- 3. tensors on disk
class Tensor:
    """A tensor left where it is: read(lo, hi) gives elements lo..hi of its flat data, as raw bits of dtype."""
    def __init__(self, dtype, shape, read, scale=None):
        self.dtype, self.shape, self.read, self.scale = dtype, tuple(shape), read, scale
        self.size = math.prod(self.shape)

    def f32(self, lo=0, hi=None):
        return to_f32(self.read(lo, self.size if hi is None else hi), self.dtype, self.scale)

    def array(self):
        return self.f32().reshape(self.shape)

    def chunks(self):
        """Ranges of whole rows, about CHUNK elements each."""
        row = math.prod(self.shape[1:])
        step = max(1, CHUNK // max(row, 1)) * max(row, 1)
        return [(lo, min(lo + step, self.size)) for lo in range(0, self.size, step)]


def from_array(a):
    flat = np.ascontiguousarray(a, np.float32).reshape(-1)
    return Tensor("F32", np.shape(a), lambda lo, hi: flat[lo:hi])


def read_safetensors(path):
    """({name: Tensor}, metadata). Reads, not mmap: mapped pages would count as memory until the kernel takes them."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        try:
            header = json.loads(f.read(n) if 2 <= n <= size - 8 else b"")
            meta, tensors = header.pop("__metadata__", {}), {}
            for name, h in header.items():
                dtype, shape, (lo, hi) = h["dtype"], tuple(h["shape"]), h["data_offsets"]
                if dtype not in RAW:
                    raise Error(f"{path}: {name} is {dtype}; F32, BF16, F16 and HiF8 are read: convert it first")
                if 8 + n + hi > size:
                    raise Error(f"{path}: cut short, {name} needs {8 + n + hi} bytes, the file has {size}: fetch the file again")
                if lo < 0 or hi - lo != math.prod(shape) * RAW[dtype].itemsize:
                    raise Error(f"{path}: {name} {list(shape)} does not fit its {hi - lo} bytes: fetch the file again")

                def read(lo, hi, raw=RAW[dtype], start=8 + n + lo):
                    data = np.fromfile(path, raw, hi - lo, offset=start + lo * raw.itemsize)
                    if len(data) != hi - lo:
                        raise Error(f"{path}: became shorter while it was read: start again")
                    return data
                tensors[name] = Tensor(dtype, shape, read)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Error(f"{path}: no safetensors header (or cut short, {size} bytes): fetch the file again")
    return tensors, meta


def read_torch(path):
    """A state dict saved by torch.save, mapped, unpickled as data only (weights_only: no code runs)."""
    if not zipfile.is_zipfile(path):
        raise Error(f"{path}: no file of torch.save, or cut short: save the model's state_dict() with torch 1.6 or later")
    torch, = need("torch")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        raise Error(f"{path}: holds more than tensors, or is cut short: save the model's state_dict() and nothing else")
    for key in ("state_dict", "model", "module", "ema"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise Error(f"{path}: no state dict (tensors under names): save the model's state_dict() and nothing else")
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
    tensors = {}
    for name, t in state.items():
        if t.dtype not in names:
            raise Error(f"{path}: {name} is {t.dtype}; float32, bfloat16 and float16 are read: convert it first")

        def read(lo, hi, t=t, raw=RAW[names[t.dtype]]):
            part = t.reshape(-1)[lo:hi].contiguous()
            data = part.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[raw.itemsize]).numpy().view(raw).copy()
            forget(part.data_ptr(), data.nbytes)
            return data
        tensors[name] = Tensor(names[t.dtype], t.shape, read)
    return tensors, {}


def read_file(path):
    return (read_torch if path.endswith((".pth", ".pt", ".bin")) else read_safetensors)(path)


def forget(address, size):
    """Give the pages inside a mapped, read range back, so that a mapped file does not fill the memory (Linux)."""
    import ctypes
    first, last = -(-address // 4096) * 4096, (address + size) // 4096 * 4096
    if sys.platform == "linux" and last - first >= 1 << 20:       # never small ones: those may not be mapped at all
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), 4)


def weight_files(src):
    """SRC may be a file, an index, a folder of shards, or a pipeline's folder with transformer/ in it."""
    if os.path.isfile(src) and not src.endswith(".index.json"):
        return [src]
    if os.path.isdir(src) and os.path.isdir(os.path.join(src, "transformer")):
        src = os.path.join(src, "transformer")
    folder = src if os.path.isdir(src) else os.path.dirname(src)
    if not os.path.exists(src):
        raise Error(f"{src}: no such file or folder")
    found = sorted(os.listdir(folder))
    index = [os.path.basename(src)] if folder != src else [f for f in found if f.endswith(".index.json")][:1]
    if index:
        with open(os.path.join(folder, index[0])) as f:
            try:
                names = sorted(set(json.load(f)["weight_map"].values()))
            except (ValueError, KeyError, AttributeError):
                raise Error(f"{f.name}: no index of shards: fetch the file again")
    else:
        names = [f for f in found if f.endswith(".safetensors")]
        names = names or [f for f in found if f.endswith((".pth", ".pt", ".bin")) and not re.search("VAE|t5|clip", f)]
        for f in names:                                          # ...-00002-of-00006.safetensors: all six?
            part = re.fullmatch(r"(.*-)\d{5}-of-(\d{5})(\..*)", f)
            names = sorted({*names, *(f"{part[1]}{i + 1:05}-of-{part[2]}{part[3]}" for i in range(int(part[2])))}
                           ) if part else names
    missing = [f for f in names if f not in found]
    if missing:
        raise Error(f"{folder}: shard {missing[0]} is missing{f' and {len(missing) - 1} more' if missing[1:] else ''}:"
                    " fetch the folder again")
    if not names:
        raise Error(f"{folder}: no .safetensors, .pth, .pt or .bin file here: give the folder of the DiT")
    return [os.path.join(folder, f) for f in names]


def load(src):
    """All tensors of a checkpoint under their own names, and its config: config.json, or an osp file's metadata."""
    tensors, given, files = {}, {}, weight_files(src)
    for path in files:
        more, meta = read_file(path)
        twice = sorted(tensors.keys() & more.keys())
        if twice:
            raise Error(f"{path}: {twice[0]} is in two files: leave one checkpoint in the folder")
        tensors.update(more)
        given.update(meta if "dim" in meta else {})
    config = os.path.join(os.path.dirname(files[0]), "config.json")
    if not given and os.path.exists(config):
        try:
            with open(config) as f:
                given = dict(json.load(f))
        except ValueError:
            raise Error(f"{config}: no JSON: fetch it again, or delete it and give --heads")
    for name in [n for n, t in tensors.items() if t.dtype == "U8"]:
        if name + ".scale" not in tensors:
            raise Error(f"{src}: {name} is U8 without {name}.scale: no HiF8 file of osp's; export the original again")
        tensors[name].scale = tensors.pop(name + ".scale").f32()[0]
    return tensors, given


# ------------------------------------------------------------------------------------- 4. names and shapes (spec §2)
WRAPPERS = re.compile(r"^((base_model\.model|model|module|transformer|diffusion_model)\.)+|"
                      r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
DIFFUSERS = [(re.compile(a), b) for a, b in [
    (r"^condition_embedder\.(time|text)_embedder\.linear_1\.", r"\1_embedding.0."),
    (r"^condition_embedder\.(time|text)_embedder\.linear_2\.", r"\1_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^scale_shift_table$", "head.modulation"), (r"^proj_out\.", "head.head."),
    (r"\.scale_shift_table$", ".modulation"), (r"\.norm2\.", ".norm3."),        # diffusers numbers norms by their use
    (r"\.attn1\.", ".self_attn."), (r"\.attn2\.", ".cross_attn."), (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".o."), (r"\.ffn\.net\.0\.proj\.", ".ffn.0."), (r"\.ffn\.net\.2\.", ".ffn.2.")]]
BLOCK_MATRIX = re.compile(r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])\.weight")


def spec_names(names, where):
    """{name in the file: name of spec §2}, and which naming it was."""
    plain = {n: WRAPPERS.sub("", n) for n in names}
    diffusers = any(re.match(r"condition_embedder\.|blocks\.\d+\.attn[12]\.", p) for p in plain.values())
    if not diffusers and not any(re.match(r"blocks\.\d+\.(self|cross)_attn\.", p) for p in plain.values()):
        raise Error(f"{where}: neither Wan's, OSP-Next's nor diffusers' names ({', '.join(sorted(names)[:3])}, ...):"
                    " give the folder of the DiT")
    for pattern, new in DIFFUSERS if diffusers else []:
        plain = {n: pattern.sub(new, p) for n, p in plain.items()}
    return plain, "diffusers" if diffusers else "original"


def spec_shapes(c):
    dim, ffn = c["dim"], c["ffn_dim"]
    s = {"patch_embedding.weight": (dim, c["in_dim"], 1, 2, 2), "patch_embedding.bias": (dim,)}

    def linear(name, rows, columns):
        s[name + ".weight"], s[name + ".bias"] = (rows, columns), (rows,)
    linear("text_embedding.0", dim, c["text_dim"]), linear("text_embedding.2", dim, dim)
    linear("time_embedding.0", dim, c["freq_dim"]), linear("time_embedding.2", dim, dim)
    linear("time_projection.1", 6 * dim, dim)
    for b in (f"blocks.{i}." for i in range(c["num_layers"])):
        s[b + "modulation"], s[b + "norm3.weight"], s[b + "norm3.bias"] = (1, 6, dim), (dim,), (dim,)
        for attn in (b + "self_attn.", b + "cross_attn."):
            for x in "qkvo":
                linear(attn + x, dim, dim)
            s[attn + "norm_q.weight"] = s[attn + "norm_k.weight"] = (dim,)
        linear(b + "ffn.0", ffn, dim), linear(b + "ffn.2", dim, ffn)
    s["head.modulation"] = (1, 2, dim)
    linear("head.head", 4 * c["out_dim"], dim)
    if c["vocab"]:
        s["text_encoder.weight"] = (c["vocab"], c["text_dim"])   # the toy worlds' table of words
    return s


def model_config(shapes, given, naming, args, where):
    """Sizes from the tensors themselves, the rest from the checkpoint's config, then Wan's values; options win."""
    def size(name, axis):
        if name not in shapes or len(shapes[name]) <= axis:
            raise Error(f"{where}: {name} is missing or misshapen: is the checkpoint whole?")
        return shapes[name][axis]
    number = lambda key, default: type(default)(given[key]) if given.get(key) not in (None, "") else default
    layers = 1 + max([int(n.split(".")[1]) for n in shapes if re.match(r"blocks\.\d+\.", n)])
    c = dict(dim=size("patch_embedding.weight", 0), ffn_dim=size("blocks.0.ffn.0.weight", 0), num_heads=0,
             num_layers=number("num_layers", layers), num_full_blocks=0, sparse_ratio=1,
             in_dim=size("patch_embedding.weight", 1), out_dim=size("head.head.weight", 0) // 4,
             text_dim=size("text_embedding.0.weight", 1), text_len=number("text_len", 512),
             freq_dim=size("time_embedding.0.weight", 1), eps=number("eps", 1e-6), quant=0, quant_attn=0, vocab=0)
    if "text_encoder.weight" in shapes:
        c["vocab"] = size("text_encoder.weight", 0)
    for key in ("dim", "ffn_dim", "in_dim", "text_dim", "freq_dim"):
        if number(key, c[key]) != c[key]:
            raise Error(f"{where}: config says {key} {given[key]}, the tensors {c[key]}: they belong to two models")
    c["num_heads"] = args.heads or number("num_heads", 0) or number("num_attention_heads", c["dim"] // 128)
    if c["num_heads"] < 1 or c["dim"] % (2 * c["num_heads"]):
        raise Error(f"{where}: dim {c['dim']} does not split into {c['num_heads']} heads of even size: give --heads N")
    for key in ("quant", "quant_attn"):
        c[key] = int(args.hif8 or given.get(key) in (1, "1", "hif8"))

    # Which blocks are sparse: the options say, else the checkpoint; Wan's own classes are full, the rest is OSP-Next.
    L, F, usual = c["num_layers"], args.full_blocks, min(8, c["num_layers"] // 8 * 4)
    layout = args.layout or ("dual_end" if F is not None else given.get("skiparse_model_type"))
    if layout is None and "num_full_blocks" in given:
        layout = "full" if number("num_full_blocks", L) == L else "dual_end"
    if layout is None:
        wan = naming == "diffusers" or given.get("_class_name") == "WanModel"
        layout = "full" if wan else "dual_end"
    if layout not in ("full", "dual_end"):
        raise Error(f"{where}: its layout is {layout}, osp knows full and dual_end: give --layout")
    if layout == "full":
        return dict(c, num_full_blocks=L)
    F = number("num_full_blocks", usual) if F is None else F
    F = usual if F == L and args.full_blocks is None else F      # a full model on its way to a sparse one
    if L % 2 or F % 4 or not 0 <= 2 * F <= L:
        raise Error(f"{where}: {F} full blocks of {L}: dual_end takes a multiple of 4, up to half: give --full-blocks")
    return dict(c, num_full_blocks=F, sparse_ratio=max(2, number("sparse_ratio", 2)))


def model_of(src, args):
    """(spec-named tensors, config), complete, of the right shapes, nothing left over: or an Error."""
    found, given = load(src)
    renamed, naming = spec_names(found, src)
    tensors = {spec: found[n] for n, spec in renamed.items()}
    odd = [n for n in renamed.values() if re.search("img|image_embedder|add_[kv]_proj|added_kv", n)]
    if odd:
        raise Error(f"{src}: {odd[0]} belongs to an image-to-video model: osp reads text-to-video weights")
    if any("lora_" in n or ".base_layer." in n for n in found):
        raise Error(f"{src}: a LoRA that is not merged: export the base model, then: weights_export.py lora")
    if len(tensors) < len(found):
        raise Error(f"{src}: two tensors of one name once prefixes are dropped: leave one model in the file")
    config = model_config({n: t.shape for n, t in tensors.items()}, given, naming, args, src)
    shapes = spec_shapes(config)
    if "dim" in given and "vocab" in given:                      # osp's own checkpoint: leave its training state behind
        tensors = {n: t for n, t in tensors.items() if not {n.partition(".")[2], n.split(".", 2)[-1]} & shapes.keys()}
        config.update({k: given[k] for k in ("T", "H_l", "W_l") if k in given})
    for what, names in ("missing", [n for n in shapes if n not in tensors]), ("left over", sorted(tensors.keys() - shapes)):
        if names:
            raise Error(f"{src}: {len(names)} tensor{'s'[:len(names) > 1]} {what}: {', '.join(names[:3])}"
                        f"{', ...' if names[3:] else ''}: is this a whole text-to-video DiT?")
    for n, shape in shapes.items():
        if tensors[n].shape != shape:
            raise Error(f"{src}: {n} is {list(tensors[n].shape)}, expected {list(shape)}: are the files of one model?")
    return {n: tensors[n] for n in shapes}, config


# ------------------------------------------------------------------------------------------------------- 5. writing
def stored_as(name, t, dtype):
    """f32: everything F32. bf16: matrices BF16. hif8: the blocks' matrices HiF8, other matrices as they came (BF16 or
    F32). Vectors (biases, norms, modulation) are F32 always: a thousandth of the bytes, and where rounding shows most."""
    if dtype == "f32" or len(t.shape) == 1 or name.endswith("modulation"):
        return "F32"
    if dtype == "hif8" and BLOCK_MATRIX.fullmatch(name):
        return "U8"
    return "BF16" if dtype == "bf16" or t.dtype == "BF16" else "F32"


def scale_of(name, t):
    """k of a tensor on its way to HiF8: one pass for the maximum."""
    amax = np.max([np.abs(t.f32(lo, hi)).max() for lo, hi in t.chunks()])
    if not np.isfinite(amax):
        raise Error(f"{name}: holds NaN or Inf: the source is damaged, fetch it again")
    return hif8_scale(amax)


def is_finite(raw, dtype):
    if dtype == "U8":
        return not np.isin(raw, (0x80, 0x6F, 0xEF)).any()
    inf = {"F32": 0x7F800000, "BF16": 0x7F80}[dtype]
    return not ((raw.view(f"u{raw.itemsize}") & inf) == inf).any()


def write_weights(path, plan, meta):
    """A safetensors file of (name, dtype, Tensor): header first, as all shapes are known, then data chunk by chunk."""
    entries = {}
    for name, dtype, t in plan:
        entries[name] = (dtype, t.shape)
        if dtype == "U8":
            entries[name + ".scale"] = ("F32", (1,))
    header, end = {"__metadata__": {k: str(v) for k, v in meta.items()}}, 0
    for name, (dtype, shape) in sorted(entries.items(), key=lambda e: -RAW[e[1][0]].itemsize):    # aligned, no holes
        size = math.prod(shape) * RAW[dtype].itemsize
        header[name] = dict(dtype=dtype, shape=list(shape), data_offsets=[end, end + size])
        end += size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free < end:
        raise Error(f"{path}: {end / 1e9:.1f} GB do not fit on this disk: free some, or choose another -o or --dtype")
    progress = Progress(end)
    with new_file(path) as f:
        f.write(struct.pack("<Q", len(text)) + text)
        start = f.tell()
        for name, dtype, t in plan:
            same, k = t.dtype == dtype, None                     # the same format: the bytes as they are
            if dtype == "U8":
                k = t.scale if same else scale_of(name, t)
                f.seek(start + header[name + ".scale"]["data_offsets"][0])
                f.write(np.float32(k).tobytes())
            f.seek(start + header[name]["data_offsets"][0])
            for lo, hi in t.chunks():
                raw = t.read(lo, hi) if same else from_f32(t.f32(lo, hi), dtype, k)
                if not is_finite(raw, dtype):
                    raise Error(f"{name}: holds NaN or Inf (as {dtype}): the source is damaged, fetch it again")
                if raw[0] or raw.any():
                    f.write(memoryview(raw).cast("B"))
                else:
                    f.seek(raw.nbytes, os.SEEK_CUR)              # zeros stay a hole in the file
                progress.add(raw.nbytes, name)
        f.truncate(start + end)
    return start + end


# ------------------------------------------------------------------------------------------------------ 6. commands
def dit(args):
    """Checkpoint -> one file for osp."""
    tensors, config = model_of(args.src, args)
    size = write_weights(args.output, [(n, stored_as(n, t, args.dtype), t) for n, t in tensors.items()],
                         dict(config, eps=decimal(config["eps"])))
    L, F = config["num_layers"], config["num_full_blocks"]
    layout = "all full" if F == L else f"{F} full, {(L - F) // 2} token-wise, {(L - F) // 2} group-wise"
    print(f"{args.output}: {sum(t.size for t in tensors.values()) / 1e9:.2f} B parameters, {L} blocks ({layout}), "
          f"dim {config['dim']}, {config['num_heads']} heads, {args.dtype}, {size / 1e9:.2f} GB")


def decimal(x):
    return f"{x:.12f}".rstrip("0").rstrip(".")


def read_lora(src, args):
    """{matrix: (A [r, in], B [out, r])} and alpha/r, from a peft adapter or a LoRA file of osp's."""
    folder, config = src, {}
    if os.path.isdir(src):
        names = [f for f in ("adapter_model.safetensors", "adapter_model.bin") if os.path.exists(os.path.join(src, f))]
        if not names:
            raise Error(f"{src}: no adapter_model.safetensors or adapter_model.bin here: give the adapter's folder")
        src = os.path.join(src, names[0])
    else:
        folder = os.path.dirname(src)
    if not os.path.exists(src):
        raise Error(f"{src}: no such file or folder")
    tensors, meta = read_file(src)
    if os.path.exists(os.path.join(folder, "adapter_config.json")) and "lora_alpha" not in meta:
        with open(os.path.join(folder, "adapter_config.json")) as f:
            config = json.load(f)
    if config.get("alpha_pattern") or config.get("rank_pattern") or config.get("use_dora"):
        raise Error(f"{folder}: ranks or alphas by layer, or DoRA: merge it with peft's merge_and_unload() instead")
    pairs = {}
    for name, t in tensors.items():
        m = re.fullmatch(r"(.*)\.lora_([AB])\.(?:default\.)?weight", WRAPPERS.sub("", name))
        if not m or len(t.shape) != 2:
            raise Error(f"{src}: {name} {list(t.shape)} is no lora_A or lora_B matrix: give a peft or osp LoRA")
        target = m[1] + ".weight"
        for pattern, new in DIFFUSERS if ".attn" in target or ".net." in target else []:
            target = pattern.sub(new, target)
        pairs.setdefault(target, {})[m[2]] = t.array()
    single = [n for n, p in pairs.items() if len(p) < 2]
    if single or not pairs:
        raise Error(f"{src}: {single[0] if single else 'nothing here'} has no lora_A and lora_B: is the adapter whole?")
    ranks = {p["A"].shape[0] for p in pairs.values()} | {p["B"].shape[1] for p in pairs.values()}
    rank = args.rank or int(float(meta.get("lora_rank") or config.get("r") or min(ranks)))
    if ranks != {rank}:
        raise Error(f"{src}: matrices of rank {sorted(ranks)}, expected {rank}: is its adapter_config.json another's?")
    alpha = args.alpha if args.alpha is not None else meta.get("lora_alpha", config.get("lora_alpha"))
    if alpha is None:
        raise Error(f"{src}: no lora_alpha in its metadata or in adapter_config.json beside it: give --alpha (paper: 64)")
    return {n: (p["A"], p["B"]) for n, p in pairs.items()}, float(alpha) / (rank ** 0.5 if config.get("use_rslora") else rank)


def lora(args):
    """W + alpha/r · B·A, rows at a time; every tensor keeps its format (HiF8 gets a new scale)."""
    tensors, meta = load(args.src)
    if "dim" not in meta or "num_full_blocks" not in meta:
        raise Error(f"{args.src}: no file of osp's: write it first: weights_export.py dit")
    pairs, scale = read_lora(args.lora, args)
    plan = []
    for name, t in tensors.items():
        out = t
        if name in pairs:
            A, B = pairs.pop(name)
            if t.shape != (B.shape[0], A.shape[1]):
                raise Error(f"{args.lora}: B·A for {name} is {[B.shape[0], A.shape[1]]}, the weight {list(t.shape)}: "
                            "is it this model's adapter?")
            row = t.shape[1]
            out = Tensor("F32", t.shape, lambda lo, hi, t=t, A=A, B=B, row=row:
                         t.f32(lo, hi) + (scale * (B[lo // row:hi // row] @ A)).reshape(-1))
        plan.append((name, t.dtype if t.dtype != "F16" else "F32", out))
    if pairs:
        raise Error(f"{args.lora}: {next(iter(pairs))} is not in {args.src}: is it this model's adapter?")
    merged = sum(out.read is not tensors[n].read for n, _, out in plan)
    size = write_weights(args.output, plan, meta)
    print(f"{args.output}: {merged} matrices merged, alpha/r = {scale:g}, {size / 1e9:.2f} GB")


# Wan's default negative prompt: gaudy, overexposed, static, blurred, subtitles, ugly, deformed limbs, walking backwards
NEGATIVE = ("色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
            "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
            "背景人很多，倒着走")


def pretrained(cls, folder, **options):
    if not os.path.isdir(folder):
        raise Error(f"{folder}: no such folder: give a diffusers folder of Wan2.1, or the part of it that is asked for")
    try:
        return cls.from_pretrained(folder, local_files_only=True, **options)
    except Exception as e:
        reason = " ".join(str(e).split())[:120]
        raise Error(f"{folder}: {cls.__name__} cannot read it ({reason}): give a diffusers folder of Wan2.1")


def part_of(folder, part):
    return os.path.join(folder, part) if os.path.isdir(os.path.join(folder, part)) else folder


def text(args):
    """Prompt and negative prompt -> text_cond, text_uncond [text_len, text_dim], zero rows after the last token."""
    torch, transformers = need("torch", "transformers")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = pretrained(transformers.AutoTokenizer, args.tokenizer or part_of(args.encoder, "tokenizer"))
    encoder = pretrained(transformers.UMT5EncoderModel, part_of(args.encoder, "text_encoder"),
                         dtype=torch.float32 if args.dtype == "f32" else torch.bfloat16).eval().to(device)
    rows, out = [], {}
    for name, prompt in ("text_cond", args.prompt), ("text_uncond", args.negative):
        tokens = tokenizer(" ".join(prompt.split()), padding="max_length", max_length=args.text_len, truncation=True,
                           return_tensors="pt").to(device)
        with torch.no_grad():
            x = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state[0].float().cpu().numpy()
        rows.append(int(tokens.attention_mask.sum()))
        x[rows[-1]:] = 0
        out[name] = x
    write_weights(args.output, [(n, "F32", from_array(x)) for n, x in out.items()],
                  dict(prompt=args.prompt, negative=args.negative, text_rows=rows[0], negative_rows=rows[1]))
    print(f"{args.output}: text_cond ({rows[0]} rows) and text_uncond ({rows[1]} rows), padded to {list(x.shape)}")


def write_png(path, rgb):
    h, w, _ = rgb.shape
    chunk = lambda kind, data: (struct.pack(">I", len(data)) + kind + data
                                + struct.pack(">I", zlib.crc32(kind + data)))
    rows = np.concatenate([np.zeros((h, 1), np.uint8), rgb.reshape(h, w * 3)], axis=1)       # 0: no filter
    with open(path, "wb") as f:
        f.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0))
                + chunk(b"IDAT", zlib.compress(rows.tobytes(), 6)) + chunk(b"IEND", b""))


def find_ffmpeg():
    if shutil.which("ffmpeg"):
        return "ffmpeg"
    try:
        return __import__("imageio_ffmpeg").get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        raise Error("no ffmpeg for .mp4: python3 -m pip install imageio-ffmpeg, or -o FOLDER/ for PNG frames")


def video(args):
    """Latent [16, T, H, W] as the DiT makes it -> Wan's decoder -> MP4, or a folder of PNG frames."""
    ffmpeg = None if args.output.endswith("/") else find_ffmpeg()
    torch, diffusers = need("torch", "diffusers")
    tensors, _ = read_safetensors(args.src) if os.path.isfile(args.src) else ({}, None)
    if "latent" not in tensors or len(tensors["latent"].shape) != 4:
        raise Error(f"{args.src}: no tensor latent [16, T, H, W] here: write it with osp sample --text ... -o FILE")
    latent = tensors["latent"].array()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    vae = pretrained(diffusers.AutoencoderKLWan, part_of(args.vae, "vae")).eval().to(device)
    if latent.shape[0] != vae.config.z_dim:
        raise Error(f"{args.src}: a latent of {latent.shape[0]} channels, this VAE has {vae.config.z_dim}: is it Wan's?")
    if args.tile:
        vae.enable_tiling()
    per_channel = lambda x: np.array(x, np.float32).reshape(-1, 1, 1, 1)
    latent = latent * per_channel(vae.config.latents_std) + per_channel(vae.config.latents_mean)
    with torch.no_grad():
        x = vae.decode(torch.from_numpy(latent)[None].to(device, vae.dtype)).sample[0]
    frames = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
    n, h, w, _ = frames.shape
    with new_file(args.output) as f:
        if ffmpeg:
            done = subprocess.run([ffmpeg, "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{w}x{h}",
                                   "-r", str(args.fps), "-i", "-", "-c:v", "libx264", "-crf", "18", "-pix_fmt", "yuv420p",
                                   "-movflags", "+faststart", "-f", "mp4", f.name], input=frames.tobytes(), capture_output=True)
            if done.returncode:
                raise Error(f"ffmpeg: {' '.join(done.stderr.decode().split())[:160]}: -o FOLDER/ writes PNG frames")
        else:
            for i, frame in enumerate(frames):
                write_png(os.path.join(f, f"{i:04}.png"), frame)
    print(f"{args.output}: {n} frames of {w}x{h}, {args.fps} a second")


class Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        raise Error(f"{self.prog.split()[-1]}: {message}: -h lists the options")


def parse(argv):
    parser = Parser(prog="weights_export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    def command(run, example):
        p = commands.add_parser(run.__name__, help=run.__doc__.split("\n")[0], description=run.__doc__,
                                epilog=f"example: python3 weights_export.py {run.__name__} {example}",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.set_defaults(run=run)
        return p
    p = command(dit, "OSP-Next/ -o osp.safetensors --dtype bf16")
    p.add_argument("src", help="folder, shard index or file in Wan's, OSP-Next's or diffusers' naming, or a file of osp's")
    p.add_argument("-o", dest="output", metavar="FILE", required=True)
    p.add_argument("--dtype", choices=["bf16", "f32", "hif8"], default="bf16", help="of matrices; vectors are always f32")
    p.add_argument("--layout", choices=["dual_end", "full"], help="default: what the checkpoint says; Wan's own are full")
    p.add_argument("--full-blocks", type=int, metavar="F", help="full blocks of dual_end; default: the checkpoint's, or 8")
    p.add_argument("--heads", type=int, metavar="N", help="default: config.json's, or dim/128")
    p.add_argument("--hif8", action="store_true", help="mark the model as one that computes in HiF8 (OSP-Next-HiF8)")
    p = command(lora, "osp.safetensors --lora lora-checkpoint-28/ -o tuned.safetensors")
    p.add_argument("src", help="a file written by dit, or by osp")
    p.add_argument("--lora", required=True, metavar="ADAPTER", help="peft folder, adapter_model.{bin,safetensors}, or osp's")
    p.add_argument("-o", dest="output", metavar="FILE", required=True)
    p.add_argument("--alpha", type=float, help="default: what the adapter says")
    p.add_argument("--rank", type=int, help="default: what the adapter says")
    p = command(text, '"a red fox runs" -o fox.safetensors --encoder Wan2.1-T2V-14B-Diffusers/')
    p.add_argument("prompt")
    p.add_argument("-o", dest="output", metavar="FILE", required=True)
    p.add_argument("--encoder", required=True, metavar="DIR", help="UMT5-XXL: a diffusers folder of Wan2.1 or its text_encoder/")
    p.add_argument("--tokenizer", metavar="DIR", help="default: tokenizer/ in --encoder, or --encoder itself")
    p.add_argument("--negative", default=NEGATIVE, metavar="TEXT", help="what guidance leads away from")
    p.add_argument("--text-len", type=int, default=512)
    p.add_argument("--dtype", choices=["bf16", "f32"], default="bf16", help="of the encoder's weights (11 or 23 GB)")
    p.add_argument("--device", help="default: cuda where there is one, else cpu")
    p = command(video, "latent.safetensors -o fox.mp4 --vae Wan2.1-T2V-14B-Diffusers/")
    p.add_argument("src", help="latent written by osp sample")
    p.add_argument("-o", dest="output", metavar="FILE", required=True, help="clip.mp4, or frames/ for PNG files")
    p.add_argument("--vae", required=True, metavar="DIR", help="a diffusers folder of Wan2.1 or its vae/")
    p.add_argument("--fps", type=int, default=16)
    p.add_argument("--tile", action="store_true", help="decode tile by tile: less memory")
    p.add_argument("--device", help="default: cuda where there is one, else cpu")
    p = command(test, "--all")
    p.add_argument("--all", action="store_true", help="also what needs torch, transformers, diffusers and ./osp")
    p.add_argument("--golden", default="golden", metavar="DIR", help="reference numbers")
    p.add_argument("--osp", default="./osp", metavar="PROGRAM")
    return parser.parse_args(argv)


def main(argv=None):
    try:
        args = parse(argv)
        return args.run(args) or 0
    except Error as e:
        reason = str(e)
    except OSError as e:
        reason = f"{e.filename or 'a file'}: {e.strerror}: choose another path, or free some space"
    except KeyboardInterrupt:
        reason = "stopped: nothing was written"
    print(f"weights_export: {' '.join(reason.split())}", file=sys.stderr)
    return 2


# --------------------------------------------------------------------------------------------------------- 7. tests
# Tiny random models, written by the safetensors package in each naming, exported, and compared with what went in.
TINY = dict(dim=32, ffn_dim=48, num_heads=2, num_layers=8, num_full_blocks=4, sparse_ratio=2, in_dim=4, out_dim=4,
            text_dim=24, text_len=7, freq_dim=16, eps=1e-6, quant=0, quant_attn=0, vocab=0)
TO_DIFFUSERS = [(r"^(time|text)_embedding\.0\.", r"condition_embedder.\1_embedder.linear_1."),
                (r"^(time|text)_embedding\.2\.", r"condition_embedder.\1_embedder.linear_2."),
                (r"^time_projection\.1\.", "condition_embedder.time_proj."), (r"^head\.modulation", "scale_shift_table"),
                (r"^head\.head\.", "proj_out."), (r"\.modulation$", ".scale_shift_table"), (r"\.norm3\.", ".norm2."),
                (r"self_attn\.([qkv])\.", r"attn1.to_\1."), (r"cross_attn\.([qkv])\.", r"attn2.to_\1."),
                (r"self_attn\.o\.", "attn1.to_out.0."), (r"cross_attn\.o\.", "attn2.to_out.0."), (r"self_attn", "attn1"),
                (r"cross_attn", "attn2"), (r"ffn\.0\.", "ffn.net.0.proj."), (r"ffn\.2\.", "ffn.net.2.")]


def in_naming(weights, naming):
    names = {n: n for n in weights}
    for pattern, new in TO_DIFFUSERS if naming == "diffusers" else []:
        names = {n: re.sub(pattern, new, m) for n, m in names.items()}
    return {("base_model.model." if naming == "merged" else "") + names[n]: x for n, x in weights.items()}


def save(path, arrays, dtype="F32", meta=None):
    """F32 by the safetensors package, which is not the code under test; numpy has no bf16, so that by write_weights."""
    from safetensors.numpy import save_file
    if dtype == "F32":
        return save_file({n: np.ascontiguousarray(x, np.float32) for n, x in arrays.items()}, path, meta)
    write_weights(path, [(n, dtype, from_array(x)) for n, x in arrays.items()], meta or {})


def save_folder(folder, arrays, dtype="F32", shards=1, config=None):
    os.makedirs(folder)
    names, where = list(arrays), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        where.update({n: file for n in names[i::shards]})
        save(os.path.join(folder, file), {n: arrays[n] for n in names[i::shards]}, dtype)
    for file, what in (("model.safetensors.index.json", shards > 1 and {"weight_map": where}), ("config.json", config)):
        if what:
            with open(os.path.join(folder, file), "w") as f:
                json.dump(what, f)
    return folder


def quiet(*argv):
    """Run a command in this process: (exit status, stderr)."""
    import io
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        return main([str(a) for a in argv]), err.getvalue()


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test(args):
    """Check this program on tiny random models (seconds; --all: also against torch, transformers, diffusers, osp)."""
    import tempfile
    results = []

    def check(name, ok, detail=""):                              # ok: None where it could not be tried
        results.append("skipped" if ok is None else "passed" if ok else "failed")
        print(f"{results[-1]}  {name}{'  ' if detail else ''}{detail}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        test_numpy(check, folder, args.golden)
        test_memory(check, folder, 2)
        if args.all:
            test_torch(check, folder, args.osp)
    print(", ".join(f"{results.count(r)} {r}" for r in ("passed", "failed", "skipped") if r != "skipped" or r in results))
    return 1 if "failed" in results else 0


def test_numpy(check, folder, golden):
    at = lambda *parts: os.path.join(folder, *parts)
    rng = np.random.default_rng(1)
    weights = {n: rng.normal(0, 0.1, s).astype(np.float32) for n, s in spec_shapes(TINY).items()}
    config = dict(num_heads=2, text_len=7, skiparse_model_type="dual_end", num_full_blocks=4, sparse_ratio=2)

    # HiF8 against the reference
    path = os.path.join(golden, "hif8.safetensors")
    if os.path.exists(path):
        g, _ = read_safetensors(path)
        x, code, value = g["x"].f32(), g["code"].read(0, g["code"].size), g["decode"].f32()
        check("hif8: every golden x has its code", (hif8_encode(x) == code).all(), f"{len(x)} numbers")
        check("hif8: every code has its value", np.array_equal(HIF8_VALUE, value, equal_nan=True))
    else:
        check("hif8", False, f"no {path}: give --golden DIR")

    # every naming, format and sharding -> the same numbers
    for naming in ("original", "diffusers", "merged"):
        for dtype in ("F32", "BF16"):
            for shards in (1, 3):
                src, out = at(f"{naming}{dtype}{shards}"), at(f"{naming}{dtype}{shards}.out")
                c = dict(num_attention_heads=2, text_len=7) if naming == "diffusers" else config
                save_folder(src, in_naming(weights, naming), dtype, shards, c)
                ok = True
                for want in ("f32", "bf16", "hif8"):
                    status, err = quiet("dit", src, "-o", out, "--dtype", want, "--layout", "dual_end")
                    t, meta = read_safetensors(out) if status == 0 else ({}, {})
                    ok &= status == 0 and meta == {k: decimal(v) if k == "eps" else str(v) for k, v in TINY.items()}
                    for n, w in weights.items():
                        exact = to_f32(from_f32(w, dtype), dtype)
                        kind = stored_as(n, Tensor(dtype, w.shape, None), want)
                        if ok and kind == "U8":
                            k = np.float32(15) / np.abs(exact).max()
                            ok &= t[n + ".scale"].f32()[0] == k and same_bits(
                                t[n].read(0, w.size), hif8_encode(exact * k).reshape(-1))
                        elif ok:
                            ok &= t[n].dtype == kind and same_bits(
                                t[n].array(), to_f32(from_f32(exact, kind), kind).reshape(w.shape))
                check(f"dit: {naming} names, {dtype}, {shards} file{'s'[:shards > 1]} -> f32, bf16, hif8", ok, err.strip())

    # an exported file exports to itself, and the safetensors package reads it
    from safetensors import deserialize
    for dtype in ("f32", "bf16", "hif8"):
        quiet("dit", at("originalF321"), "-o", at("one.safetensors"), "--dtype", dtype)
        quiet("dit", at("one.safetensors"), "-o", at("two.safetensors"), "--dtype", dtype)
        with open(at("one.safetensors"), "rb") as f, open(at("two.safetensors"), "rb") as g:
            one, two = f.read(), g.read()
        check(f"dit: {dtype} export of an export, bit for bit", one == two and len(deserialize(one)) >= len(weights))
    quiet("dit", at("diffusersF321"), "-o", at("full.safetensors"), "--dtype", "f32")
    meta = read_safetensors(at("full.safetensors"))[1]
    check("dit: Wan's own model is full attention", meta["num_full_blocks"] == "8" and meta["sparse_ratio"] == "1")

    # LoRA: peft's names and osp's, onto every format
    A = {n: rng.normal(0, 1, (4, w.shape[1])) for n, w in weights.items() if BLOCK_MATRIX.fullmatch(n) and "attn" in n}
    B = {n: rng.normal(0, .02, (weights[n].shape[0], 4)) for n in A}
    for kind, prefix in ("peft", "base_model.model."), ("osp", ""):
        pair = {f"{prefix}{n[:-7]}.lora_{x}.weight": np.float32(m[n]) for x, m in (("A", A), ("B", B)) for n in A}
        os.makedirs(at(kind))
        save(at(kind, "adapter_model.safetensors"), pair, meta=dict(lora_rank="4", lora_alpha="8") if kind == "osp" else None)
        if kind == "peft":
            with open(at(kind, "adapter_config.json"), "w") as f:
                json.dump(dict(r=4, lora_alpha=8), f)
        ok = True
        for dtype in ("f32", "bf16", "hif8"):
            quiet("dit", at("originalF321"), "-o", at("base"), "--dtype", dtype)
            status, err = quiet("lora", at("base"), "--lora", at(kind), "-o", at("merged"))
            base, merged = load(at("base"))[0], load(at("merged"))[0] if status == 0 else {}
            for n in base if merged else []:
                w = base[n].array() + (2 * (np.float32(B[n]) @ np.float32(A[n])) if n in A else 0)
                step = {"F32": 1e-6, "BF16": 4e-3, "U8": 0.07}[base[n].dtype]
                ok &= base[n].dtype == merged[n].dtype and np.abs(merged[n].array() - w).max() <= step * np.abs(w).max()
            ok &= bool(merged)
        check(f"lora: {kind}'s names onto f32, bf16, hif8", ok, err.strip())

    # bad input: one line, status 2, nothing left behind
    def refuses(what, expect, *argv):
        os.makedirs(at("empty"), exist_ok=True)
        status, err = quiet(*argv, "-o", at("empty", "x.safetensors"))
        ok = status == 2 and err.count("\n") == 1 and err.startswith("weights_export: ") and re.search(expect, err)
        check(f"refuses {what}", ok and not os.listdir(at("empty")), err.strip().replace(folder + "/", ""))

    def broken(name, change, shards=1, naming="original", **options):
        arrays = in_naming(weights, naming)
        arrays = change(arrays) or arrays
        return save_folder(at(name), arrays, shards=shards, config=config, **options)
    os.remove(os.path.join(broken("gone", lambda w: None, 3), "model-00002-of-00003.safetensors"))
    refuses("a missing shard", "model-00002-of-00003.* is missing", "dit", at("gone"))
    os.remove(at("gone", "model.safetensors.index.json"))
    refuses("a missing shard, no index", "model-00002-of-00003.* is missing", "dit", at("gone"))
    file = os.path.join(broken("short", lambda w: None, 3), "model-00002-of-00003.safetensors")
    os.truncate(file, os.path.getsize(file) - 100)
    refuses("a truncated shard", "cut short", "dit", at("short"))
    os.truncate(file, 100)
    refuses("a truncated header", "cut short", "dit", at("short"))
    name = "blocks.3.ffn.0.weight"
    refuses("an absent tensor", f"1 tensor missing: {name}", "dit", broken("absent", lambda w: w.pop(name) is None))
    refuses("an extra tensor", "left over: blocks.3.gate", "dit", broken("extra", lambda w: w.update({"blocks.3.gate": w[name]})))
    refuses("a wrong shape", r"\[48, 31\], expected \[48, 32\]", "dit", broken("shape", lambda w: w.update({name: w[name][:, 1:]})))
    refuses("NaN", "NaN or Inf", "dit", broken("nan", lambda w: w.update({name: w[name] * np.nan})), "--dtype", "hif8")
    refuses("unknown names", "neither Wan's", "dit", broken("names", lambda w: {"layer." + n: x for n, x in w.items()}))
    refuses("an image-to-video model", "image-to-video", "dit",
            broken("i2v", lambda w: w.update({"img_emb.proj.1.weight": w[name]})))
    refuses("an unmerged LoRA", "not merged", "dit", broken("raw", lambda w: w.update({name[:-7] + ".lora_A.weight": w[name]})))
    refuses("a LoRA of another model", "is it this model", "lora", at("one.safetensors"), "--lora", at("other.safetensors")) \
        if not save(at("other.safetensors"), {f"blocks.9.self_attn.q.lora_{x}.weight": np.ones(s) for x, s in
                                              (("A", (4, 32)), ("B", (32, 4)))}, meta=dict(lora_alpha="8")) else None
    with open(at("weights.pth"), "wb") as f:
        f.write(b"\x80\x04\x95 not a zip archive")
    refuses("a pickle of another kind", "no file of torch.save", "dit", at("weights.pth"))
    refuses("a path that is not there", "no such", "dit", at("nowhere"))
    refuses("an unknown option", "unrecognized", "dit", at("gone"), "--dtyp", "f32")
    status, err = quiet("dit", at("originalF321"), "-o", at("nowhere", "x"))
    check("refuses an output folder that is not there", status == 2 and err.count("\n") == 1, err.strip().replace(folder, ""))


def test_memory(check, folder, layers):
    """14B's shapes, zeros that take no space on the disk in or out: how much memory does the export take?"""
    c = dict(TINY, dim=5120, ffn_dim=13824, num_layers=layers, in_dim=16, out_dim=16, text_dim=4096, freq_dim=256)
    header, end = {}, 0
    for n, shape in spec_shapes(c).items():
        header[n] = dict(dtype="BF16", shape=shape, data_offsets=[end, end + 2 * math.prod(shape)])
        end += 2 * math.prod(shape)
    head = json.dumps(header).encode()
    src, out = os.path.join(folder, "14b.safetensors"), os.path.join(folder, "14b.out")
    with open(src, "wb") as f:
        f.write(struct.pack("<Q", len(head)) + head)
        f.truncate(8 + len(head) + end)
    begin = time.time()
    child = subprocess.Popen([sys.executable, __file__, "dit", src, "-o", out, "--dtype", "bf16"], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    peak = usage.ru_maxrss / (1 << 20 if sys.platform == "linux" else 1 << 30)
    check(f"memory: 14B's shapes, {layers} blocks of zeros", status == 0 and peak < 1.5, f"{end / 1e9:.1f} GB in {time.time() - begin:.0f} s, peak {peak:.2f} GiB")


def test_torch(check, folder, osp):
    """Tiny models of the real classes, random weights: a whole pass, each step against the library's own answer."""
    torch, transformers, diffusers, tokenizers = need("torch", "transformers", "diffusers", "tokenizers")
    at = lambda *parts: os.path.join(folder, *parts)
    relative = lambda a, b: float(np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b))
    torch.manual_seed(1)

    def scrambled(model):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        return model.eval()

    # .pth files
    weights = {n: torch.randn(s) for n, s in spec_shapes(TINY).items()}
    torch.save({"state_dict": {"module." + n: w.bfloat16() for n, w in weights.items()}}, at("w.pth"))
    status, err = quiet("dit", at("w.pth"), "-o", at("w.out"), "--dtype", "bf16", "--heads", 2)
    t = read_safetensors(at("w.out"))[0] if status == 0 else {}
    check("dit: .pth, bf16", t and all(np.array_equal(t[n].array(), w.bfloat16().float()) for n, w in weights.items()
                                       if t[n].dtype == "BF16"), err.strip())
    for what, thing in (("a pickled object", {"w": torch.nn.Linear(2, 2)}), ("a dict of no tensors", {"epoch": 3})):
        torch.save(thing, at("bad.pth"))
        status, err = quiet("dit", at("bad.pth"), "-o", at("bad.out"))
        check(f"refuses {what}", status == 2 and err.count("\n") == 1 and not os.path.exists(at("bad.out")), err.strip())

    # text: a tiny UMT5 and a tokenizer of words
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(
        "<pad> </s> <unk> a red fox runs blurred".split())}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(at("pipe", "tokenizer"))
    encoder = scrambled(transformers.UMT5EncoderModel(transformers.UMT5Config(
        vocab_size=8, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)))
    encoder.save_pretrained(at("pipe", "text_encoder"))
    status, err = quiet("text", "a red  fox runs", "--negative", "blurred", "-o", at("text.safetensors"), "--encoder",
                        at("pipe"), "--dtype", "f32", "--device", "cpu")
    t, meta = read_safetensors(at("text.safetensors")) if status == 0 else ({}, {})
    ok = status == 0 and meta["text_rows"] == "5" and meta["negative"] == "blurred"
    for name, ids in ("text_cond", [3, 4, 5, 6, 1]), ("text_uncond", [7, 1]):
        with torch.no_grad():
            want = encoder(torch.tensor([ids])).last_hidden_state[0].numpy()
        ok = ok and t[name].shape == (512, 32) and relative(t[name].array()[:len(ids)], want) < 1e-5 \
            and not t[name].array()[len(ids):].any()
    check("text: rows of UMT5, zeros after them", ok, err.strip())

    # video: a tiny VAE of Wan's
    vae = scrambled(diffusers.AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1))
    vae.save_pretrained(at("pipe", "vae"))
    latent = torch.randn(16, 3, 4, 6)
    save(at("latent.safetensors"), {"latent": latent.numpy()})
    with torch.no_grad():
        scale = lambda x: torch.tensor(x).view(1, 16, 1, 1, 1)
        z = latent[None] / (1.0 / scale(vae.config.latents_std)) + scale(vae.config.latents_mean)
        want = ((vae.decode(z).sample[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 3, 0).numpy()
    status, err = quiet("video", at("latent.safetensors"), "-o", at("frames/"), "--vae", at("pipe"))
    frames = sorted(os.listdir(at("frames"))) if status == 0 else []
    worst = max([np.abs(np.float32(read_png(at("frames", f))) - want[i]).max() for i, f in enumerate(frames)] or [999])
    check("video: PNG frames of Wan's VAE", len(frames) == len(want) == 9 and worst <= 0.51, f"off by {worst:.2f} of 255 {err.strip()}")
    status, err = quiet("video", at("latent.safetensors"), "-o", at("clip.mp4"), "--vae", at("pipe", "vae"))
    size = os.path.getsize(at("clip.mp4")) if status == 0 else 0
    check("video: MP4", None if "no ffmpeg" in err else size > 500, err.strip() or f"{size} bytes")

    # dit: diffusers' own forward against osp's, two Euler steps with guidance; then on to a clip
    model = scrambled(diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=16, out_channels=16, text_dim=32, freq_dim=32, ffn_dim=96,
        num_layers=4))
    noise = torch.randn(16, 3, 4, 6)
    save(at("noise.safetensors"), {"noise": noise.numpy()})
    for dtype, shard in ("float32", "10GB"), ("float32", "100KB"), ("bfloat16", "10GB"), ("bfloat16", "60KB"):
        model.to(getattr(torch, dtype)).save_pretrained(at("dit" + dtype + shard), max_shard_size=shard)
        model = diffusers.WanTransformer3DModel.from_pretrained(at("dit" + dtype + shard), low_cpu_mem_usage=False)
        status, err = quiet("dit", at("dit" + dtype + shard), "-o", at("dit.safetensors"), "--dtype", "f32")
        name = f"dit: diffusers' {dtype} model, {len([f for f in os.listdir(at('dit' + dtype + shard)) if 'safet' in f])} files, "
        if status or not os.path.exists(osp):
            check(name + f"by {osp}", False if status else None, err.strip() or "no such program: make osp")
            continue
        done = subprocess.run([osp, "sample", "-w", at("dit.safetensors"), "--text", at("text.safetensors"), "--noise",
                               at("noise.safetensors"), "-o", at("latent.safetensors"), "--frames", "9", "--height", "32",
                               "--width", "48", "-n", "2", "-g", "3", "--shift", "3"], capture_output=True, text=True)
        x, text_file = noise[None].clone(), read_safetensors(at("text.safetensors"))[0]
        rows = [torch.from_numpy(text_file[n].array())[None] for n in ("text_cond", "text_uncond")]
        sigmas = [3 * s / (1 + 2 * s) for s in (1.0, 0.5, 0.0)]
        for s, s_next in zip(sigmas, sigmas[1:]):
            with torch.no_grad():
                v_c, v_u = (model(x, torch.tensor([1000 * s]), r).sample for r in rows)
            x = x + (s_next - s) * (v_u + 3 * (v_c - v_u))
        got = read_safetensors(at("latent.safetensors"))[0]["latent"].array() if done.returncode == 0 else np.inf
        error = relative(got - noise.numpy(), (x[0] - noise).numpy())
        check(name + "osp against diffusers", error < 1e-5, f"relative L2 {error:.1e} {done.stderr.strip()[-200:] if error > 1 else ''}")
    if os.path.exists(osp):
        status, err = quiet("video", at("latent.safetensors"), "-o", at("clip/"), "--vae", at("pipe"))
        check("text -> dit -> sample -> video", status == 0 and len(os.listdir(at("clip"))) == 9, err.strip())


def read_png(path):
    """The frames written by write_png."""
    with open(path, "rb") as f:
        data = f.read()
    w, h = struct.unpack(">II", data[16:24])
    at = data.index(b"IDAT")
    rows = zlib.decompress(data[at + 4:at + 4 + struct.unpack(">I", data[at - 4:at])[0]])
    return np.frombuffer(rows, np.uint8).reshape(h, 1 + 3 * w)[:, 1:].reshape(h, w, 3)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))      # so that a half-written file is removed
    sys.exit(main())
