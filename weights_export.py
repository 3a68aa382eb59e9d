#!/usr/bin/env python3
"""weights_export.py: the published weights of Wan2.1 and OSP-Next into a file osp reads; text in, video out.

  python3 weights_export.py dit   OSP-Next/ -o osp.safetensors --dtype bf16      weights: one file, spec names, config
  python3 weights_export.py lora  osp.safetensors --lora adapter/ -o tuned.safetensors        W + alpha/r · B·A
  python3 weights_export.py text  "a red fox runs" -o fox.safetensors --encoder Wan2.1-Diffusers/            UMT5-XXL
  osp sample -w osp.safetensors --text fox.safetensors -o latent.safetensors --frames 81 --height 720 --width 1280
  python3 weights_export.py video latent.safetensors -o fox.mp4 --vae Wan2.1-Diffusers/                  Wan's decoder
  python3 weights_export.py test [--all]

dit and lora need numpy only; .pth files, text and video ask for torch, transformers or diffusers when they are used.
No tensor is ever whole in memory: files are read and written some rows at a time, so 14B weights pass through a laptop.
A file is written beside its target and renamed when complete. An error is one line on stderr and exit status 2.

1 errors and output   2 numbers: bf16, HiF8   3 tensors on disk   4 names and shapes   5 writing   6 commands   7 tests
"""
import argparse, contextlib, json, math, os, re, shutil, signal, struct, subprocess, sys, time, zipfile, zlib

try:
    import numpy as np
except ImportError:
    print("weights_export: numpy is missing: python3 -m pip install numpy safetensors", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------------------------- 1. errors and output
class Error(Exception):
    """What, where, what to do: main() prints it as one line and exits 2."""


def need(*packages):
    """Import packages that only some commands need."""
    os.environ.update(TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error", HF_HUB_OFFLINE="1")
    try:
        return [__import__(p) for p in packages]
    except ImportError as e:
        wanted = " ".join(packages).replace("transformers", "transformers sentencepiece")
        raise Error(f"{e.name} is missing (torch takes gigabytes): python3 -m pip install {wanted}")


@contextlib.contextmanager
def new_file(path):
    """An open file (for a path ending in /, a folder) under a temporary name; it becomes `path` if all goes well."""
    target, folder = path.rstrip("/"), path.endswith("/")
    temp = f"{target}.{os.getpid()}.tmp"
    if os.path.exists(target) and os.path.isdir(target) != folder:
        raise Error(f"{path}: {'a file' if folder else 'a folder'} of that name is there: choose another -o")
    try:
        if folder:
            os.mkdir(temp)
            yield temp
        else:
            with open(temp, "wb") as f:
                yield f
        os.replace(temp, target)                                 # a folder replaces an empty one only
    except BaseException:
        shutil.rmtree(temp) if os.path.isdir(temp) else os.path.exists(temp) and os.unlink(temp)
        raise


def progress(total):
    """A function of (amount, label) that draws [#####....] on stderr, where someone is watching."""
    done, start, last = 0, time.time(), 0.0

    def step(amount, label):
        nonlocal done, last
        done, now = done + amount, time.time()
        if sys.stderr.isatty() and (now - last > 0.1 or done == total):
            last, part = now, done / total
            bar, left = "#" * int(30 * part), (now - start) * (1 - part) / part
            print(f"\r[{bar:.<30}] {part:4.0%}  {left:4.0f} s left  {label}\033[K", end="\n" * (done == total),
                  file=sys.stderr, flush=True)
    return step


# --------------------------------------------------------------------------------- 2. numbers: bf16, HiF8 (spec §6)
RAW = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "U8": np.dtype("u1")}


def hif8_value(code):
    """The number a byte stands for: sign, prefix code for the widths of two fields, exponent, mantissa."""
    sign, c = (-1.0 if code & 0x80 else 1.0), code & 0x7F
    if c == 0:    return math.nan if code else 0.0
    if c == 0x6F: return sign * math.inf
    if c < 0x08:  return sign * 2.0 ** (c - 23)
    width, m = next(w for dot, *w in ((0x60, 4, 1), (0x40, 3, 2), (0x20, 2, 3), (0x10, 1, 3), (0, 0, 3)) if c >= dot)
    field, top = c >> m & (1 << width) - 1, 1 << width >> 1      # top: E's sign in the field, |E|'s leading 1 in value
    E = (-1 if field & top else 1) * (top | field & top - 1) if width else 0
    return sign * 2.0 ** E * (1 + (c & (1 << m) - 1) / (1 << m))


def hif8_round(x):
    """To 3, 2, 1 or 0 mantissa bits as |E| grows, half away from zero."""
    a = abs(x)
    if a < 2.0 ** -23 or a >= 40960: return math.copysign(math.inf, x) if a > 1 else 0.0
    E = max(math.frexp(a)[1] - 1, -22)
    m = 3 if abs(E) <= 3 else 2 if abs(E) <= 7 else 1 if abs(E) <= 15 else 0
    return math.copysign(math.floor(a * 2.0 ** (m - E) + 0.5) * 2.0 ** (E - m), x)


# That rounding sees the sign, the exponent, three mantissa bits and the one below: the code is a function of the top
# 13 bits of a float32 (NaN apart), and encoding a tensor one look-up per element, exact.
HIF8_VALUE = np.array([hif8_value(c) for c in range(256)], np.float32)
CODE_OF = {hif8_value(c): c for c in range(256)}
HIF8_CODE = np.array([CODE_OF[hif8_round(x)] if x == x else 0x80
                      for x in (np.arange(8192, dtype=np.uint32) << 19).view(np.float32).tolist()], np.uint8)


def hif8_encode(x):
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return np.where((u & 0x7FFFFFFF) > 0x7F800000, np.uint8(0x80), HIF8_CODE[u >> 19])


def to_f32(raw, dtype, k=None):
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return HIF8_VALUE[raw] / k if dtype == "U8" else raw.astype(np.float32, copy=False)


def from_f32(x, dtype, k=None):
    if dtype == "BF16":                                          # to nearest, ties to even; no NaN comes here
        u = np.ascontiguousarray(x).view(np.uint32)
        return ((u + (0x7FFF + (u >> 16 & 1))) >> 16).astype(np.uint16)
    return hif8_encode(x * k) if dtype == "U8" else x


def is_finite(raw, dtype):
    if dtype == "U8":
        return not np.isin(raw, (0x80, 0x6F, 0xEF)).any()
    inf = {"F32": 0x7F800000, "BF16": 0x7F80}[dtype]
    return not ((raw.view(f"u{raw.itemsize}") & inf) == inf).any()


# --------------------------------------------------------------------------------------------- 3. tensors on disk
class Tensor:
    """A tensor left where it is: read(lo, hi) gives elements lo..hi of its flat data, as raw bits of dtype."""
    def __init__(self, dtype, shape, read, k=None):
        self.dtype, self.shape, self.read, self.k = dtype, tuple(shape), read, k        # k: HiF8's scale
        self.size = math.prod(self.shape)

    def f32(self, lo, hi):
        return to_f32(self.read(lo, hi), self.dtype, self.k)

    def array(self):
        return self.f32(0, self.size).reshape(self.shape)

    def chunks(self):
        """Ranges of whole rows, about 4 million elements each."""
        row = math.prod(self.shape[1:])
        step = max(1, (1 << 22) // row) * row
        return [(lo, min(lo + step, self.size)) for lo in range(0, self.size, step)]


def from_array(a):
    flat = np.ascontiguousarray(a, np.float32).reshape(-1)
    return Tensor("F32", np.shape(a), lambda lo, hi: flat[lo:hi])


def read_safetensors(path):
    """({name: Tensor}, metadata). Reads, not mmap: mapped pages would count as memory until the kernel takes them."""
    size, tensors = os.path.getsize(path), {}
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        try:
            header = json.loads(f.read(n) if n <= size - 8 else b"")
            meta = header.pop("__metadata__", {})
            entries = [(name, h["dtype"], tuple(h["shape"]), *h["data_offsets"]) for name, h in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Error(f"{path}: no safetensors header, or cut short ({size} bytes): fetch the file again")
    for name, dtype, shape, lo, hi in entries:
        if dtype not in RAW:
            raise Error(f"{path}: {name} is {dtype}; F32, BF16, F16 and HiF8 are read: convert it first")
        if 8 + n + hi > size:
            raise Error(f"{path}: cut short: {name} needs {8 + n + hi} bytes, the file has {size}: fetch it again")
        if lo < 0 or hi - lo != math.prod(shape) * RAW[dtype].itemsize or hi == lo:
            raise Error(f"{path}: {name} {list(shape)} does not fit its {hi - lo} bytes: fetch the file again")

        def read(lo, hi, raw=RAW[dtype], start=8 + n + lo):
            return np.fromfile(path, raw, hi - lo, offset=start + lo * raw.itemsize)
        tensors[name] = Tensor(dtype, shape, read)
    return tensors, meta


def read_torch(path):
    """A state dict of torch.save, mapped, unpickled as data only (weights_only: nothing in it can run)."""
    if not zipfile.is_zipfile(path):
        raise Error(f"{path}: no file of torch.save, or cut short: fetch it again, or save it with torch >= 1.6")
    torch, = need("torch")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        raise Error(f"{path}: holds more than tensors, or is cut short: save the model's state_dict() and nothing else")
    for key in ("state_dict", "model", "module", "ema"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not state or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise Error(f"{path}: no state dict (tensors under names): save the model's state_dict() and nothing else")
    dtypes = {torch.float32: ("F32", torch.int32), torch.bfloat16: ("BF16", torch.int16),
              torch.float16: ("F16", torch.int16)}
    tensors = {}
    for name, t in state.items():
        if t.dtype not in dtypes:
            raise Error(f"{path}: {name} is {t.dtype}; float32, bfloat16 and float16 are read: convert it first")
        dtype, bits = dtypes[t.dtype]

        def read(lo, hi, t=t, bits=bits, raw=RAW[dtype]):
            part = t.reshape(-1)[lo:hi]
            data = part.view(bits).numpy().view(raw).copy()
            if sys.platform == "linux" and part.nbytes >= 1 << 20 and t.is_contiguous():
                unmap_pages(part.data_ptr(), part.nbytes)
            return data
        tensors[name] = Tensor(dtype, t.shape, read)
    return tensors, {}


def unmap_pages(address, size):
    """Give back the pages of a range of a mapped file that has been read, or 14B weights would fill the memory."""
    import ctypes
    first, last = -(-address // 4096) * 4096, (address + size) // 4096 * 4096
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), 4)      # MADV_DONTNEED


def read_file(path):
    return (read_torch if path.endswith((".pth", ".pt", ".bin")) else read_safetensors)(path)


def read_json(path):
    try:
        with open(path) as f:
            return dict(json.load(f))
    except (ValueError, TypeError):
        raise Error(f"{path}: no JSON object: fetch the file again")


def weight_files(src):
    """SRC is a file, or a folder of them: the index's shards, or all .safetensors, or the .pth that is no VAE or T5."""
    if os.path.isfile(src):
        return [src]
    if not os.path.isdir(src):
        raise Error(f"{src}: no such file or folder")
    src = part_of(src, "transformer")
    found = sorted(os.listdir(src))
    index = [f for f in found if f.endswith(".index.json")]
    names = [f for f in found if f.endswith(".safetensors")] or \
            [f for f in found if f.endswith((".pth", ".pt", ".bin")) and not re.search("VAE|t5|clip", f)]
    if index:
        names = sorted(set(read_json(os.path.join(src, index[0])).get("weight_map", {}).values()))
    for m in [m for m in (re.fullmatch(r"(.*-)\d{5}-of-(\d{5})(\..*)", f) for f in names) if m]:
        names = sorted({*names, *(f"{m[1]}{i + 1:05}-of-{m[2]}{m[3]}" for i in range(int(m[2])))})
    missing = [f for f in names if f not in found]
    if missing:
        raise Error(f"{src}: shard {missing[0]} is missing ({len(missing)} of {len(names)} are): fetch it again")
    if not names:
        raise Error(f"{src}: no .safetensors, .pth, .pt or .bin file here: give the folder of the DiT")
    return [os.path.join(src, f) for f in names]


def part_of(folder, part):
    """A pipeline's folder holds transformer/, text_encoder/, tokenizer/, vae/: that one, or the folder itself."""
    return os.path.join(folder, part) if os.path.isdir(os.path.join(folder, part)) else folder


def load(src):
    """All tensors of a checkpoint under their own names, and its config: an osp file's metadata, or config.json."""
    tensors, given, files = {}, {}, weight_files(src)
    for path in files:
        more, meta = read_file(path)
        twice = tensors.keys() & more.keys()
        if twice:
            raise Error(f"{path}: {min(twice)} is in two files: leave one checkpoint in the folder")
        tensors.update(more)
        given.update(meta if "dim" in meta else {})
    config = os.path.join(os.path.dirname(files[0]), "config.json")
    given = given or (read_json(config) if os.path.exists(config) else {})
    for name in [n for n, t in tensors.items() if t.dtype == "U8"]:
        if name + ".scale" not in tensors:
            raise Error(f"{src}: {name} is U8 without {name}.scale, so not HiF8: export the original again")
        tensors[name].k = tensors.pop(name + ".scale").array()[0]
    return tensors, given


# ------------------------------------------------------------------------------------- 4. names and shapes (spec §2)
WRAPPERS = re.compile(r"^((base_model\.model|model|module|transformer|diffusion_model)\.)+|"
                      r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
FROM_DIFFUSERS = [
    (r"^condition_embedder\.(time|text)_embedder\.linear_1\.", r"\1_embedding.0."),
    (r"^condition_embedder\.(time|text)_embedder\.linear_2\.", r"\1_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^scale_shift_table$", "head.modulation"), (r"^proj_out\.", "head.head."),
    (r"\.scale_shift_table$", ".modulation"), (r"\.norm2\.", ".norm3."),      # diffusers counts norms as they are used
    (r"\.attn1\.", ".self_attn."), (r"\.attn2\.", ".cross_attn."), (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".o."), (r"\.ffn\.net\.0\.proj\.", ".ffn.0."), (r"\.ffn\.net\.2\.", ".ffn.2.")]
BLOCK_MATRIX = re.compile(r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])\.weight")


def rename(names, table):
    for pattern, new in table:
        names = [re.sub(pattern, new, n) for n in names]
    return names


def spec_names(names, where):
    """The names of spec §2 for those in a file, and whether diffusers had named them."""
    plain = [WRAPPERS.sub("", n) for n in names]
    if any(re.match(r"condition_embedder\.|blocks\.\d+\.attn[12]\.", n) for n in plain):
        return rename(plain, FROM_DIFFUSERS), True
    if not any(re.match(r"blocks\.\d+\.(self|cross)_attn\.", n) for n in plain):
        raise Error(f"{where}: neither Wan's, OSP-Next's nor diffusers' names ({', '.join(plain[:2])}, ...):"
                    " give the folder of the DiT")
    return plain, False


def spec_shapes(c):
    dim, shapes = c["dim"], {}

    def linear(name, rows, *columns):
        shapes[name + ".weight"], shapes[name + ".bias"] = (rows, *columns), (rows,)
    linear("patch_embedding", dim, c["in_dim"], 1, 2, 2)
    linear("text_embedding.0", dim, c["text_dim"]), linear("text_embedding.2", dim, dim)
    linear("time_embedding.0", dim, c["freq_dim"]), linear("time_embedding.2", dim, dim)
    linear("time_projection.1", 6 * dim, dim)
    for i in range(c["num_layers"]):
        shapes[f"blocks.{i}.modulation"] = (1, 6, dim)
        for attn in (f"blocks.{i}.self_attn.", f"blocks.{i}.cross_attn."):
            for x in "qkvo":
                linear(attn + x, dim, dim)
            shapes[attn + "norm_q.weight"] = shapes[attn + "norm_k.weight"] = (dim,)
        linear(f"blocks.{i}.norm3", dim)
        linear(f"blocks.{i}.ffn.0", c["ffn_dim"], dim), linear(f"blocks.{i}.ffn.2", dim, c["ffn_dim"])
    shapes["head.modulation"] = (1, 2, dim)
    linear("head.head", 4 * c["out_dim"], dim)
    if c["vocab"]:
        shapes["text_encoder.weight"] = (c["vocab"], c["text_dim"])           # a toy's table of words
    return shapes


def model_config(shapes, given, is_diffusers, args, where):
    """Sizes from the tensors, the rest from the checkpoint's config, else Wan's values; options win."""
    def size(name, axis):
        if len(shapes.get(name, ())) <= axis:
            raise Error(f"{where}: tensor {name} is missing or misshapen: is the checkpoint whole?")
        return shapes[name][axis]
    number = lambda key, default: type(default)(given[key]) if given.get(key) not in (None, "") else default
    c = dict(dim=size("patch_embedding.weight", 0), ffn_dim=size("blocks.0.ffn.0.weight", 0), num_heads=0,
             num_layers=1 + max(int(n.split(".")[1]) for n in shapes if n.startswith("blocks.")),
             num_full_blocks=0, sparse_ratio=1, in_dim=size("patch_embedding.weight", 1),
             out_dim=size("head.head.weight", 0) // 4, text_dim=size("text_embedding.0.weight", 1),
             text_len=number("text_len", 512), freq_dim=size("time_embedding.0.weight", 1), eps=number("eps", 1e-6),
             quant=0, quant_attn=0, vocab=size("text_encoder.weight", 0) if "text_encoder.weight" in shapes else 0)
    for key in ("dim", "ffn_dim", "in_dim", "text_dim", "freq_dim", "num_layers"):
        if number(key, c[key]) != c[key]:
            raise Error(f"{where}: its config says {key} {given[key]}, its tensors {c[key]}: is the checkpoint whole?")
    c["num_heads"] = args.heads or number("num_heads", 0) or number("num_attention_heads", c["dim"] // 128)
    if c["num_heads"] < 1 or c["dim"] % (2 * c["num_heads"]):
        raise Error(f"{where}: dim {c['dim']} does not split into {c['num_heads']} heads of even size: give --heads N")
    for key in ("quant", "quant_attn"):
        c[key] = int(args.hif8 or given.get(key) in (1, "1", "hif8"))

    # Which blocks are sparse: the options say, else the checkpoint; Wan's own classes are full, the rest is OSP-Next.
    L, F, layout = c["num_layers"], args.full_blocks, args.layout or given.get("skiparse_model_type")
    known = number("num_full_blocks", L)
    if layout is None:
        full = known == L if "num_full_blocks" in given else is_diffusers or given.get("_class_name") == "WanModel"
        layout = "full" if full and F is None else "dual_end"
    if layout == "full":
        return dict(c, num_full_blocks=L)
    F = F if F is not None else known if known < L else min(8, L // 8 * 4)
    if layout != "dual_end" or L % 2 or F % 4 or not 0 <= 2 * F <= L:
        raise Error(f"{where}: layout {layout}, {F} full blocks of {L}: osp knows full, and dual_end with a multiple "
                    "of 4 up to half of an even number: give --layout or --full-blocks")
    return dict(c, num_full_blocks=F, sparse_ratio=max(2, number("sparse_ratio", 2)))


def load_model(src, args):
    """(tensors under spec names, config): complete, of the right shapes, nothing left over, or an Error."""
    found, given = load(src)
    names, is_diffusers = spec_names(found, src)
    tensors = dict(zip(names, found.values()))
    for pattern, what in (
            ("img|image_embedder|add_[kv]_proj", "an image-to-video model: osp reads text-to-video weights"),
            (r"lora_|\.base_layer\.", "a LoRA not merged: export the base model, then weights_export.py lora")):
        odd = [n for n in names if re.search(pattern, n)]
        if odd:
            raise Error(f"{src}: {odd[0]} belongs to {what}")
    if len(tensors) < len(found):
        raise Error(f"{src}: names are equal once prefixes like model. are dropped: leave one model in the file")
    config = model_config({n: t.shape for n, t in tensors.items()}, given, is_diffusers, args, src)
    shapes = spec_shapes(config)
    config.update({k: given[k] for k in ("T", "H_l", "W_l") if given.get(k, "0") != "0"})      # a toy's size of clips
    for what, odd in (("missing", shapes.keys() - tensors.keys()), ("left over", tensors.keys() - shapes.keys())):
        if odd:
            raise Error(f"{src}: {len(odd)} tensor{'s'[:len(odd) > 1]} {what}: {', '.join(sorted(odd)[:3])}"
                        f"{', ...' * (len(odd) > 3)}: is this a whole text-to-video DiT?")
    for n, shape in shapes.items():
        if tensors[n].shape != shape:
            raise Error(f"{src}: {n} is {list(tensors[n].shape)}, expected {list(shape)}: are the files of one model?")
    return {n: tensors[n] for n in shapes}, config


# ------------------------------------------------------------------------------------------------------- 5. writing
def stored_as(name, shape, dtype):
    """f32: everything F32. bf16: matrices BF16. hif8: the blocks' matrices HiF8, other matrices BF16. Vectors (biases,
    norms, modulation) are F32 always: a thousandth of the bytes, each acting on every token."""
    if dtype == "f32" or len(shape) == 1 or name.endswith("modulation"):
        return "F32"
    return "U8" if dtype == "hif8" and BLOCK_MATRIX.fullmatch(name) else "BF16"


def hif8_scale(name, t):
    """k = 15 / max|x| in float32, one pass over the tensor: the file holds hif8(x·k) and k; a reader divides."""
    amax = np.max([np.abs(t.f32(lo, hi)).max() for lo, hi in t.chunks()])
    if not np.isfinite(amax):
        raise Error(f"{name}: holds NaN or Inf: the source is damaged, fetch it again")
    return np.float32(15) / np.maximum(amax, np.float32(1e-8))


def write_weights(path, plan, meta):
    """A safetensors file of (name, dtype, Tensor): header first, as all shapes are known, then data chunk by chunk."""
    entries = {name: (dtype, t.shape) for name, dtype, t in plan}
    entries.update({name + ".scale": ("F32", (1,)) for name, dtype, _ in plan if dtype == "U8"})
    header, end = {"__metadata__": {k: str(v) for k, v in meta.items()}}, 0
    for name, (dtype, shape) in sorted(entries.items(), key=lambda e: -RAW[e[1][0]].itemsize):    # all stay aligned
        size = math.prod(shape) * RAW[dtype].itemsize
        header[name] = dict(dtype=dtype, shape=list(shape), data_offsets=[end, end + size])
        end += size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start, step = 8 + len(text), progress(sum(t.size for _, _, t in plan))
    with new_file(path) as f:
        if shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free < end:
            raise Error(f"{path}: {end / 1e9:.1f} GB do not fit on this disk: free some or choose another -o")
        f.write(struct.pack("<Q", len(text)) + text)
        for name, dtype, t in plan:
            same, k = t.dtype == dtype, t.k                      # the same format: the bytes as they are
            if dtype == "U8":
                k = k if same else hif8_scale(name, t)
                f.seek(start + header[name + ".scale"]["data_offsets"][0])
                f.write(k.tobytes())
            f.seek(start + header[name]["data_offsets"][0])
            for lo, hi in t.chunks():
                raw = t.read(lo, hi) if same else from_f32(t.f32(lo, hi), dtype, k)
                if len(raw) != hi - lo or not is_finite(raw, dtype):
                    raise Error(f"{name}: holds NaN or Inf, or its file changed: the source is damaged, fetch it again")
                if raw.view(f"u{raw.itemsize}").any():
                    f.write(memoryview(raw).cast("B"))
                else:
                    f.seek(raw.nbytes, os.SEEK_CUR)              # zeros stay a hole in the file
                step(hi - lo, name)
        f.truncate(start + end)
    return start + end


# ------------------------------------------------------------------------------------------------------ 6. commands
def dit(args):
    """Checkpoint -> one file for osp."""
    tensors, c = load_model(args.src, args)
    size = write_weights(args.output, [(n, stored_as(n, t.shape, args.dtype), t) for n, t in tensors.items()],
                         dict(c, eps=np.format_float_positional(c["eps"])))
    L, F = c["num_layers"], c["num_full_blocks"]
    layout = "all full" if F == L else f"{F} full, {(L - F) // 2} token-wise, {(L - F) // 2} group-wise"
    print(f"{args.output}: {sum(t.size for t in tensors.values()) / 1e9:.2f} B parameters, {L} blocks ({layout}), "
          f"dim {c['dim']}, {c['num_heads']} heads, {args.dtype}, {size / 1e9:.2f} GB")


def read_lora(src, alpha):
    """{matrix: (A [r, in], B [out, r])} and alpha/r, of a peft adapter or of a LoRA file that osp wrote."""
    names = ("adapter_model.safetensors", "adapter_model.bin", "")
    path = next((f for f in (os.path.join(src, n).rstrip("/") for n in names) if os.path.isfile(f)), None)
    if path is None:
        raise Error(f"{src}: no adapter here (adapter_model.safetensors or .bin): give its folder or file")
    tensors, meta = read_file(path)
    config = os.path.join(os.path.dirname(path), "adapter_config.json")
    config = read_json(config) if os.path.exists(config) and "lora_alpha" not in meta else {}
    if config.get("alpha_pattern") or config.get("rank_pattern") or config.get("use_dora"):
        raise Error(f"{src}: DoRA, or alpha or rank by layer: merge it with peft's merge_and_unload() and export that")
    pairs = {}
    for name, t in tensors.items():
        m = re.fullmatch(r"(.*)\.lora_([AB])\.(?:default\.)?weight", WRAPPERS.sub("", name))
        if not m or len(t.shape) != 2:
            raise Error(f"{src}: {name} {list(t.shape)} is no lora_A or lora_B matrix: give a LoRA of peft's or osp's")
        pairs.setdefault(rename([m[1] + ".weight"], FROM_DIFFUSERS)[0], {})[m[2]] = t.array()
    ranks = {p[x].shape[x == "B"] if x in p else 0 for p in pairs.values() for x in "AB"}
    said = float(meta.get("lora_rank", config.get("r", max(ranks, default=0))))
    if ranks != {said} or not said:
        raise Error(f"{src}: ranks {sorted(ranks)}, expected {said:g} (0: half of a pair is absent): is it whole?")
    alpha = alpha if alpha is not None else meta.get("lora_alpha", config.get("lora_alpha"))
    if alpha is None:
        raise Error(f"{src}: no lora_alpha in it nor in an adapter_config.json beside it: give --alpha (paper: 64)")
    scale = float(alpha) / (math.sqrt(said) if config.get("use_rslora") else said)
    return {n: (p["A"], p["B"]) for n, p in pairs.items()}, scale


def lora(args):
    """W + alpha/r · B·A, rows at a time; every tensor keeps its format (HiF8 gets a new scale)."""
    tensors, meta = load(args.src)
    if not {"dim", "num_full_blocks"} <= meta.keys():
        raise Error(f"{args.src}: no file of osp's: make it one first: weights_export.py dit")
    pairs, scale = read_lora(args.lora, args.alpha)
    odd = [n for n, (A, B) in pairs.items() if n not in tensors or tensors[n].shape != (len(B), A.shape[1])]
    if odd:
        raise Error(f"{args.lora}: {odd[0]} is not in {args.src}, or of another shape: is it this model's adapter?")

    def merged(name, t):
        A, B, row = *pairs[name], t.shape[1]
        return Tensor(None, t.shape, lambda lo, hi:
                      t.f32(lo, hi) + np.float32(scale) * (B[lo // row:hi // row] @ A).reshape(-1))
    plan = [(n, "F32" if t.dtype == "F16" else t.dtype, merged(n, t) if n in pairs else t) for n, t in tensors.items()]
    size = write_weights(args.output, plan, meta)
    print(f"{args.output}: {len(pairs)} matrices merged, alpha/r = {scale:g}, {size / 1e9:.2f} GB")


# Wan's own negative prompt: gaudy, overexposed, static, blurred, subtitles, ugly, deformed hands, walking backwards ...
NEGATIVE = ("色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
            "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
            "背景人很多，倒着走")


def pretrained(cls, folder, **options):
    try:
        if os.path.isdir(folder):
            return cls.from_pretrained(folder, local_files_only=True, **options)
        reason = "no such folder"
    except Exception as e:
        reason = " ".join(str(e).split())[:120]
    raise Error(f"{folder}: no {cls.__name__} here ({reason}): give a diffusers folder of Wan2.1")


def device_of(args, torch):
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def text(args):
    """Prompt and negative prompt -> text_cond, text_uncond [text_len, text_dim], zero rows after the last token."""
    torch, transformers = need("torch", "transformers")
    device = device_of(args, torch)
    tokenizer = pretrained(transformers.AutoTokenizer, part_of(args.encoder, "tokenizer"))
    encoder = pretrained(transformers.UMT5EncoderModel, part_of(args.encoder, "text_encoder"),
                         dtype=torch.float32 if args.dtype == "f32" else torch.bfloat16).eval().to(device)
    rows, out = [], {}
    for name, prompt in ("text_cond", args.src), ("text_uncond", args.negative):
        tokens = tokenizer(" ".join(prompt.split()), padding="max_length", max_length=args.text_len, truncation=True,
                           return_tensors="pt").to(device)
        with torch.no_grad():
            x = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state[0].float().cpu().numpy()
        rows.append(int(tokens.attention_mask.sum()))
        out[name] = np.where(np.arange(args.text_len)[:, None] < rows[-1], x, 0)
    write_weights(args.output, [(n, "F32", from_array(x)) for n, x in out.items()],
                  dict(prompt=args.src, negative=args.negative, text_rows=rows[0], negative_rows=rows[1]))
    print(f"{args.output}: text_cond ({rows[0]} rows) and text_uncond ({rows[1]} rows), padded to {list(x.shape)}")


def write_png(path, rgb):
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = np.pad(rgb.reshape(len(rgb), -1), ((0, 0), (1, 0)))                  # each row begins with 0: no filter
    with open(path, "wb") as f:
        f.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", rgb.shape[1], len(rgb), 8, 2, 0, 0, 0))
                + chunk(b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b""))


def find_ffmpeg():
    try:
        return shutil.which("ffmpeg") or __import__("imageio_ffmpeg").get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        raise Error("no ffmpeg to write .mp4: python3 -m pip install imageio-ffmpeg, or -o FOLDER/ for PNG frames")


def video(args):
    """Latent [16, T, H, W] as the DiT makes it -> Wan's decoder -> MP4, or a folder of PNG frames."""
    ffmpeg = None if args.output.endswith("/") else find_ffmpeg()
    torch, diffusers = need("torch", "diffusers")
    tensors = read_safetensors(args.src)[0]
    if "latent" not in tensors or len(tensors["latent"].shape) != 4:
        raise Error(f"{args.src}: no tensor latent [16, T, H, W] in it: write it with osp sample --text FILE -o LATENT")
    latent = tensors["latent"].array()
    vae = pretrained(diffusers.AutoencoderKLWan, part_of(args.vae, "vae"), low_cpu_mem_usage=False).eval()
    if len(latent) != vae.config.z_dim:
        raise Error(f"{args.src}: {len(latent)} channels, this VAE has {vae.config.z_dim}: is the latent Wan's?")
    if args.tile:
        vae.enable_tiling()
    std, mean = (np.float32(x).reshape(-1, 1, 1, 1) for x in (vae.config.latents_std, vae.config.latents_mean))
    device = device_of(args, torch)
    with torch.no_grad():
        x = vae.to(device).decode(torch.from_numpy(latent * std + mean)[None].to(device, vae.dtype)).sample[0]
    frames = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
    n, h, w, _ = frames.shape
    with new_file(args.output) as f:
        for i, frame in enumerate(frames if ffmpeg is None else []):
            write_png(os.path.join(f, f"{i:04}.png"), frame)
        if ffmpeg:
            options = (f"-y -loglevel error -f rawvideo -pix_fmt rgb24 -s {w}x{h} -r {args.fps} -i - "
                       "-c:v libx264 -crf 18 -pix_fmt yuv420p -movflags +faststart -f mp4").split()
            done = subprocess.run([ffmpeg, *options, f.name], input=frames.tobytes(), capture_output=True)
            if done.returncode:
                raise Error(f"ffmpeg says: {done.stderr.decode()[:160]}: -o FOLDER/ writes PNG frames instead")
    print(f"{args.output}: {n} frames of {w}x{h}, {args.fps} a second")


class Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        raise Error(f"{message}: -h lists the commands and their options")


def parse(argv):
    parser = Parser(prog="weights_export.py", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run, example, *source):
        about = f"{run.__doc__}\nexample: python3 weights_export.py {run.__name__} {example}"
        p = commands.add_parser(run.__name__, help=run.__doc__.split("\n")[0], description=about)
        p.set_defaults(run=run)
        if source:
            p.add_argument("src", metavar=source[0], help=source[1])
            p.add_argument("-o", dest="output", metavar="FILE", required=True, help="what to write")
        return p.add_argument
    option = command(dit, "OSP-Next/ -o osp.safetensors --dtype bf16", "SRC",
                     "folder or file in Wan's, OSP-Next's or diffusers' naming, or a file of osp's")
    option("--dtype", choices=["bf16", "f32", "hif8"], default="bf16",
           help="of matrices, default bf16; vectors are f32")
    option("--layout", choices=["dual_end", "full"], help="default: the checkpoint's; Wan's own models are full")
    option("--full-blocks", type=int, metavar="F", help="full blocks of dual_end, default the checkpoint's, or 8")
    option("--heads", type=int, metavar="N", help="default: config.json's, or dim/128")
    option("--hif8", action="store_true", help="the model computes in HiF8 (OSP-Next-HiF8), default: its config's word")
    option = command(lora, "osp.safetensors --lora lora-checkpoint-28/ -o tuned.safetensors", "FILE",
                     "a file written by dit or by osp")
    option("--lora", required=True, metavar="ADAPTER", help="peft's folder or adapter_model file, or a LoRA of osp's")
    option("--alpha", type=float, help="default: what the adapter says")
    option = command(text, '"a red fox runs" -o fox.safetensors --encoder Wan2.1-T2V-14B-Diffusers/', "PROMPT",
                     "what to show")
    option("--encoder", required=True, metavar="DIR", help="diffusers folder: text_encoder/ (UMT5-XXL) and tokenizer/")
    option("--negative", default=NEGATIVE, metavar="TEXT", help="what guidance leads away from, default Wan's own")
    option("--text-len", type=int, default=512, metavar="N", help="rows, default 512")
    option("--dtype", choices=["bf16", "f32"], default="bf16", help="of the encoder, default bf16 (11 GB)")
    option("--device", help="default: cuda where there is one, else cpu")
    option = command(video, "latent.safetensors -o fox.mp4 --vae Wan2.1-T2V-14B-Diffusers/", "LATENT",
                     "written by osp sample --text; -o FOLDER/ instead of a .mp4 writes PNG frames")
    option("--vae", required=True, metavar="DIR", help="diffusers folder of Wan2.1, or its vae/")
    option("--fps", type=int, default=16, help="default 16")
    option("--tile", action="store_true", help="decode in tiles: less memory")
    option("--device", help="default: cuda where there is one, else cpu")
    option = command(test, "--all")
    option("--all", action="store_true", help="also what needs torch, transformers, diffusers and osp")
    option("--golden", default="golden", metavar="DIR", help="reference numbers, default golden")
    option("--osp", default="./osp", metavar="PROGRAM", help="default ./osp")
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
# Tiny random models, mostly written by the packages that own the formats, go in; what comes out must be the same.
TINY = dict(dim=32, ffn_dim=48, num_heads=2, num_layers=8, num_full_blocks=4, sparse_ratio=2, in_dim=4, out_dim=4,
            text_dim=24, text_len=7, freq_dim=16, eps=1e-6, quant=0, quant_attn=0, vocab=0)
TO_DIFFUSERS = [(r"^(time|text)_embedding\.0", r"condition_embedder.\1_embedder.linear_1"), (r"\.norm3", ".norm2"),
                (r"^(time|text)_embedding\.2", r"condition_embedder.\1_embedder.linear_2"), ("ffn.0", "ffn.net.0.proj"),
                (r"^time_projection\.1", "condition_embedder.time_proj"), (r"^head\.modulation", "scale_shift_table"),
                (r"^head\.head", "proj_out"), (r"\.modulation$", ".scale_shift_table"), (r"ffn\.2", "ffn.net.2"),
                (r"attn\.([qkv])\.", r"attn.to_\1."), (r"attn\.o", "attn.to_out.0"), ("self_attn", "attn1"),
                ("cross_attn", "attn2")]
NAMINGS = {"original": [], "merged LoRA": [("^", "base_model.model.")], "diffusers": TO_DIFFUSERS}


def save(path, arrays, dtype="F32", meta=None):
    from safetensors.numpy import save_file
    if dtype == "F32":
        return save_file({n: np.ascontiguousarray(x, np.float32) for n, x in arrays.items()}, path, meta)
    write_weights(path, [(n, dtype, from_array(x)) for n, x in arrays.items()], meta or {})     # numpy has no bf16


def save_json(path, what):
    with open(path, "w") as f:
        json.dump(what, f)


def save_folder(folder, arrays, config, dtype="F32", shards=1):
    os.makedirs(folder)
    where = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        where.update({n: file for n in list(arrays)[i::shards]})
        save(os.path.join(folder, file), {n: x for n, x in arrays.items() if where.get(n) == file}, dtype)
    save_json(os.path.join(folder, "config.json"), config)
    if shards > 1:
        save_json(os.path.join(folder, "model.safetensors.index.json"), {"weight_map": where})
    return folder


def attempt(*argv):
    """A command in this process: (exit status, stderr)."""
    import io
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        return main([str(a) for a in argv]), err.getvalue()


def test(args):
    """Check this program on tiny random models: seconds; --all also against torch, transformers, diffusers and osp."""
    import tempfile
    results = []

    def check(name, ok, detail=""):                              # ok = None: could not be tried
        results.append("skipped" if ok is None else "passed" if ok else "failed")
        print(f"{results[-1]}  {name}{': ' * bool(detail)}{detail.strip().replace(folder + '/', '')}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        at = lambda *parts: os.path.join(folder, *parts)
        test_numbers(check, args.golden)
        test_export(check, at)
        test_bad_input(check, at)
        test_memory(check, at)
        test_osp(check, at, args.osp)
        if args.all:
            test_torch(check, at, args.osp)
    print(", ".join(f"{results.count(r)} {r}" for r in ("passed", "failed", "skipped")))
    return 1 if "failed" in results else 0


def test_numbers(check, golden):
    g = {n: t.read(0, t.size) for n, t in read_safetensors(os.path.join(golden, "hif8.safetensors"))[0].items()}
    check("hif8: golden codes", (hif8_encode(g["x"]) == g["code"]).all(), f"{len(g['x'])} numbers")
    check("hif8: golden values", np.array_equal(HIF8_VALUE, g["decode"], equal_nan=True))


def tiny_weights():
    rng = np.random.default_rng(1)
    weights = {n: rng.normal(0, 0.1, s).astype(np.float32) for n, s in spec_shapes(TINY).items()}
    return {**weights, "head.head.bias": np.full(16, -0.0, np.float32)}           # a zero with a sign keeps it


def tiny_config(naming="original"):
    sparse = {} if naming == "diffusers" else dict(skiparse_model_type="dual_end", num_full_blocks=4, sparse_ratio=2)
    return {"num_attention_heads" if naming == "diffusers" else "num_heads": 2, "text_len": 7, **sparse}


def is_exported(path, weights, source, dtype):
    """Is the file what a straightforward conversion of all weights at once gives, bit for bit, with TINY's metadata?"""
    t, meta = read_safetensors(path)
    ok = meta == {k: "0.000001" if k == "eps" else str(v) for k, v in TINY.items()}
    for n, w in weights.items():
        w = to_f32(from_f32(w, source), source).reshape(-1)
        kind = stored_as(n, weights[n].shape, dtype)
        k = np.float32(15) / np.abs(w).max() if kind == "U8" else None
        ok &= t[n].dtype == kind and t[n].shape == weights[n].shape
        ok &= t[n].read(0, t[n].size).tobytes() == from_f32(w, kind, k).tobytes()
        ok &= kind != "U8" or t[n + ".scale"].array()[0] == k
    return ok


def test_export(check, at):
    from safetensors import deserialize
    weights, out = tiny_weights(), at("out.safetensors")
    for naming, table in NAMINGS.items():
        for source, shards in (("F32", 1), ("F32", 3), ("BF16", 1), ("BF16", 3)):
            src = save_folder(at(f"{naming} {source} {shards}"), dict(zip(rename(weights, table), weights.values())),
                              tiny_config(naming), source, shards)
            for dtype in ("f32", "bf16", "hif8"):
                status, err = attempt("dit", src, "-o", out, "--dtype", dtype, "--layout", "dual_end")
                check(f"dit: {naming} names, {source}, {shards} file{'s'[:shards > 1]} -> {dtype}",
                      status == 0 and is_exported(out, weights, source, dtype), err)
    for dtype in ("f32", "bf16", "hif8"):
        attempt("dit", at("original F32 1"), "-o", at("one.safetensors"), "--dtype", dtype)
        attempt("dit", at("one.safetensors"), "-o", out, "--dtype", dtype)
        with open(at("one.safetensors"), "rb") as f, open(out, "rb") as g:
            one, two = f.read(), g.read()
        check(f"dit: {dtype} export of an export, bit for bit", one == two and len(deserialize(one)) >= len(weights))
    attempt("dit", at("diffusers F32 1"), "-o", out)
    check("dit: Wan's own model is all full", read_safetensors(out)[1]["num_full_blocks"] == "8")

    rng = np.random.default_rng(2)
    A = {n[:-7]: np.float32(rng.normal(0, 1, (4, 32))) for n in weights if re.search(r"attn\.[qkvo]\.weight", n)}
    B = {n: np.float32(rng.normal(0, 0.02, (32, 4))) for n in A}
    delta = {n + ".weight": 8 / 4 * B[n] @ A[n] for n in A}
    for kind, prefix, meta in ("peft", "base_model.model.", None), ("osp", "", dict(lora_rank="4", lora_alpha="8")):
        os.makedirs(at(kind))
        pairs = {f"{prefix}{n}.lora_{x}.weight": m[n] for x, m in (("A", A), ("B", B)) for n in A}
        save(at(kind, "adapter_model.safetensors"), pairs, meta=meta)
        if kind == "peft":
            save_json(at(kind, "adapter_config.json"), dict(r=4, lora_alpha=8))
        for dtype, step in ("f32", 1e-7), ("bf16", 0.002), ("hif8", 0.04):
            attempt("dit", at("original F32 1"), "-o", at("one.safetensors"), "--dtype", dtype)
            status, err = attempt("lora", at("one.safetensors"), "--lora", at(kind), "-o", out)
            one, two = load(at("one.safetensors"))[0], load(out)[0]
            off = {n: np.abs(two[n].array() - t.array() - delta.get(n, 0)).max() for n, t in one.items()}
            ok = status == 0 and all(two[n].dtype == one[n].dtype and off[n] <= step * (n in delta) for n in one)
            check(f"lora: {kind}'s names onto {dtype}", ok, err)


def test_bad_input(check, at):
    """One line, status 2, nothing left behind."""
    weights, matrix = tiny_weights(), "blocks.3.ffn.0.weight"
    os.makedirs(at("empty"))

    def refuses(what, expect, *argv):
        status, err = attempt(*argv, "-o", at("empty", "x"))
        check(f"refuses {what}", status == 2 and err.count("\n") == 1 and re.match(f"weights_export: .*{expect}", err)
              and not os.listdir(at("empty")), err)

    def changed(name, shards=1, **change):
        arrays = {n: x for n, x in {**weights, **change}.items() if x is not None}
        return save_folder(at(name), arrays, tiny_config(), shards=shards)
    file = "model-00002-of-00003.safetensors"
    os.remove(os.path.join(changed("gone", 3), file))
    refuses("a missing shard", f"{file} is missing", "dit", at("gone"))
    os.remove(at("gone", "model.safetensors.index.json"))
    refuses("a missing shard, without index", f"{file} is missing", "dit", at("gone"))
    os.truncate(os.path.join(changed("short", 3), file), 100000)
    refuses("a truncated shard", "cut short", "dit", at("short"))
    os.truncate(at("short", file), 100)
    refuses("a truncated header", "cut short", "dit", at("short"))
    refuses("an absent tensor", f"1 tensor missing: {matrix}", "dit", changed("absent", **{matrix: None}))
    refuses("absent last blocks", "num_layers", "dit", save_folder(at("cut"), {
        n: w for n, w in weights.items() if "blocks.7" not in n}, dict(tiny_config(), num_layers=8)))
    refuses("an extra tensor", "left over: blocks.3.gate", "dit", changed("extra", **{"blocks.3.gate": np.ones(3)}))
    refuses("a wrong shape", r"\[48, 31\], expected \[48, 32\]", "dit", changed("shape", **{matrix: np.ones((48, 31))}))
    changed("nan", **{matrix: np.full((48, 32), np.nan)})
    for dtype in ("f32", "bf16", "hif8"):
        refuses(f"NaN, to {dtype}", "NaN", "dit", at("nan"), "--dtype", dtype)
    refuses("an image-to-video model", "image-to-video", "dit", changed("i2v", **{"img_emb.proj.1.weight": np.ones(3)}))
    refuses("a LoRA not merged", "not merged", "dit", changed("raw", **{"blocks.0.ffn.0.lora_A.weight": np.ones(9)}))
    refuses("unknown names", "neither Wan's", "dit",
            save_folder(at("names"), {"layer." + n: x for n, x in weights.items()}, {}))
    save(at("other.safetensors"), {f"blocks.9.self_attn.q.lora_{x}.weight": np.ones((4, 4)) for x in "AB"},
         meta=dict(lora_alpha="8"))
    refuses("a LoRA of another model", "this model's adapter", "lora", at("one.safetensors"), "--lora",
            at("other.safetensors"))
    with open(at("weights.pth"), "wb") as f:
        f.write(b"\x80\x04\x95 a pickle, but no archive of torch.save")
    refuses("a pickle of another kind", "no file of torch.save", "dit", at("weights.pth"))
    refuses("a path that is not there", "no such file", "dit", at("nowhere"))
    refuses("an unknown option", "unrecognized", "dit", at("short"), "--dtyp", "f32")
    status, err = attempt("dit", at("original F32 1"), "-o", at("nowhere", "x"))
    check("refuses a folder that is not there", status == 2 and err.count("\n") == 1, err)


def test_memory(check, at, layers=2):
    """Zeros in the shapes of 14B, holes in both files: memory depends on neither the blocks nor the tensors' size."""
    header, end = {}, 0
    for n, shape in spec_shapes(dict(TINY, dim=5120, ffn_dim=13824, num_layers=layers, text_dim=4096)).items():
        header[n] = dict(dtype="BF16", shape=shape, data_offsets=[end, end + 2 * math.prod(shape)])
        end += 2 * math.prod(shape)
    head = json.dumps(header).encode()
    with open(at("zeros.safetensors"), "wb") as f:
        f.write(struct.pack("<Q", len(head)) + head)
        f.truncate(8 + len(head) + end)
    child = subprocess.Popen([sys.executable, __file__, "dit", f.name, "-o", at("zeros.out"), "--dtype", "hif8"],
                             stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    peak = usage.ru_maxrss / (1 << 20 if sys.platform == "linux" else 1 << 30)
    check(f"memory: {layers} blocks of 14B to hif8", status == 0 and peak < 1.5,
          f"{end / 1e9:.1f} GB in, peak {peak:.2f} GiB")


def test_osp(check, at, osp):
    """osp's own files: here and back bit for bit, its HiF8 codes and its merged LoRA against ours."""
    if not os.path.exists(osp):
        return check("osp's files", None, f"no program {osp}: make osp")

    def program(*argv):
        done = subprocess.run([osp, *argv], capture_output=True, text=True)
        if done.returncode:
            check(f"osp {argv[0]}", False, done.stderr)

    def tensors(name):
        return {n: (t.dtype, t.shape, t.read(0, t.size).tobytes()) for n, t in read_safetensors(at(name))[0].items()}
    program("train", "--preset", "tiny", "--steps", "0", "-o", at("new"))
    t, meta = read_safetensors(at("new"))
    rng = np.random.default_rng(3)                               # its first weights would be zero in places
    save(at("a"), {n: x.array() + rng.normal(0, 0.1, x.shape) for n, x in t.items()}, meta=meta)
    attempt("dit", at("a"), "-o", at("b"), "--dtype", "f32")
    program("train", "--init", at("b"), "--steps", "0", "-o", at("c"))
    attempt("dit", at("c"), "-o", at("d"), "--dtype", "f32")
    check("osp -> dit -> osp -> dit, bit for bit", tensors("a") == tensors("b") == tensors("c") == tensors("d"))
    program("train", "--init", at("a"), "--steps", "0", "--dtype", "hif8", "-o", at("e"))
    attempt("dit", at("a"), "-o", at("f"), "--dtype", "hif8")
    e, f = ({n: x for n, x in tensors(name).items() if BLOCK_MATRIX.match(n)} for name in "ef")
    check("dit writes osp's HiF8 codes and scales, bit for bit", len(e) > 0 and e == f, f"{len(e) // 2} matrices")
    grpo = ["grpo", "--init", at("a"), *"--steps 2 --prompts 1 --group 2 -n 3 --window 1 --lr 0.05".split()]
    program(*grpo, "-o", at("l.safetensors"))
    program(*grpo, "-o", at("g"), "--merge")
    attempt("lora", at("a"), "--lora", at("l.safetensors"), "-o", at("h"))
    (one, _), (two, _), (base, _) = (read_safetensors(at(f)) for f in "gha")
    off = max(np.abs(one[n].array() - two[n].array()).max() for n in one)
    moved = max(np.abs(one[n].array() - base[n].array()).max() for n in one)
    check("lora merges osp's adapter as osp does", off <= 1e-5 * moved, f"off by {off:.1e}, moved by {moved:.1e}")


def test_torch(check, at, osp):
    """Tiny models of the real classes, random weights: a whole pass, each step against the library's own answer."""
    import copy
    torch, transformers, diffusers, tokenizers = need("torch", "transformers", "diffusers", "tokenizers")
    from PIL import Image                                        # comes with diffusers
    relative = lambda a, b: float(np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b))
    torch.manual_seed(1)

    @torch.no_grad()
    def scrambled(model, dtype=torch.float32):
        for p in model.parameters():
            p.copy_((p + 0.1 * torch.randn_like(p)).to(dtype).float())
        return model.eval()

    weights = {n: torch.from_numpy(w) for n, w in tiny_weights().items()}
    for dtype, source in (torch.float32, "F32"), (torch.bfloat16, "BF16"):
        torch.save({"state_dict": {"module." + n: w.to(dtype) for n, w in weights.items()}}, at("w.pth"))
        save_json(at("config.json"), tiny_config())
        status, err = attempt("dit", at("w.pth"), "-o", at("w.out"))
        check(f"dit: .pth, {source}", status == 0 and is_exported(at("w.out"), tiny_weights(), source, "bf16"), err)
    for what, thing in ("a pickled object", {"w": torch.nn.Linear(2, 2)}), ("a dict without tensors", {"epoch": 3}):
        torch.save(thing, at("bad.pth"))
        status, err = attempt("dit", at("bad.pth"), "-o", at("bad.out"))
        check(f"refuses {what}", status == 2 and err.count("\n") == 1 and not os.path.exists(at("bad.out")), err)

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(
        "<pad> </s> <unk> a red fox runs blurred".split())}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>",
                                         unk_token="<unk>").save_pretrained(at("pipe", "tokenizer"))
    encoder = scrambled(transformers.UMT5EncoderModel(transformers.UMT5Config(
        vocab_size=8, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)))
    encoder.save_pretrained(at("pipe", "text_encoder"))
    status, err = attempt("text", "a red  fox runs", "--negative", "blurred", "-o", at("text.safetensors"), "--encoder",
                      at("pipe"), "--dtype", "f32", "--device", "cpu")
    t, meta = read_safetensors(at("text.safetensors"))
    ok = status == 0 and meta["text_rows"] == "5" and meta["negative"] == "blurred"
    for name, ids in ("text_cond", [3, 4, 5, 6, 1]), ("text_uncond", [7, 1]):
        rows, want = t[name].array(), encoder(torch.tensor([ids])).last_hidden_state[0].detach().numpy()
        ok &= rows.shape == (512, 32) and relative(rows[:len(ids)], want) < 1e-5 and not rows[len(ids):].any()
    check("text: rows of UMT5, zeros after them", ok, "" if ok else err)

    vae = scrambled(diffusers.AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1))
    vae.save_pretrained(at("pipe", "vae"))
    noise = torch.randn(16, 3, 4, 6)
    save(at("noise.safetensors"), {"noise": noise.numpy()})
    save(at("latent.safetensors"), {"latent": noise.numpy()})
    mean, std = (torch.tensor(x).view(1, 16, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    want = (vae.decode(noise[None] / (1 / std) + mean).sample[0].detach().clamp(-1, 1) + 1) * 127.5
    status, err = attempt("video", at("latent.safetensors"), "-o", at("frames/"), "--vae", at("pipe"))
    files = sorted(os.listdir(at("frames"))) if status == 0 else []
    got = np.float32([np.asarray(Image.open(at("frames", f))) for f in files])
    ok = len(got) == 9 and np.abs(got - want.permute(1, 2, 3, 0).numpy()).max() < 0.51
    check("video: PNG frames of Wan's VAE", ok, "" if ok else err)
    status, err = attempt("video", at("latent.safetensors"), "-o", at("clip.mp4"), "--vae", at("pipe", "vae"))
    check("video: MP4", None if "no ffmpeg" in err else status == 0 and os.path.getsize(at("clip.mp4")) > 500, err)

    model = scrambled(diffusers.WanTransformer3DModel(num_attention_heads=2, attention_head_dim=32, in_channels=16,
                      out_channels=16, text_dim=32, freq_dim=32, ffn_dim=96, num_layers=4))
    rows = [torch.from_numpy(t[n].array())[None] for n in ("text_cond", "text_uncond")]
    for dtype in (torch.float32, torch.bfloat16):
        model = scrambled(model, dtype)
        x, sigmas = noise[None], [3 * s / (1 + 2 * s) for s in (1.0, 0.5, 0.0)]
        for s, s_next in zip(sigmas, sigmas[1:]):                # spec §7: two Euler steps, shift 3, guidance 3
            v_cond, v_uncond = (model(x, torch.tensor([1000 * s]), r).sample.detach() for r in rows)
            x = x + (s_next - s) * (v_uncond + 3 * (v_cond - v_uncond))
        for naming, shards in [(n, k) for n in NAMINGS for k in (1, 3)]:
            src, state = at(f"{naming} {dtype} {shards}"), {n: w.numpy() for n, w in model.state_dict().items()}
            if naming == "diffusers":
                copy.deepcopy(model).to(dtype).save_pretrained(src, max_shard_size="10GB" if shards == 1 else "200KB")
            else:
                names = rename(spec_names(state, src)[0], NAMINGS[naming])
                save_folder(src, dict(zip(names, state.values())), dict(num_heads=2),
                            "BF16" if dtype == torch.bfloat16 else "F32", shards)
            status, err = attempt("dit", src, "-o", at("dit.safetensors"), "--dtype", "f32", "--layout", "full")
            name = f"osp against diffusers' forward: {naming} names, {dtype}, {'one file' if shards == 1 else 'shards'}"
            if status or not os.path.exists(osp):
                check(name, False if status else None, err or f"no program {osp}: make osp")
                continue
            done = subprocess.run([osp, "sample", "-w", at("dit.safetensors"), "--text", at("text.safetensors"),
                                   "--noise", at("noise.safetensors"), "-o", at("latent.safetensors"),
                                   *"--frames 9 --height 32 --width 48 -n 2 -g 3 --shift 3".split()],
                                  capture_output=True, text=True)
            if done.returncode:
                check(name, False, done.stderr)
                continue
            got = read_safetensors(at("latent.safetensors"))[0]["latent"].array()
            error = relative(got - noise.numpy(), (x[0] - noise).numpy())
            check(name, error < 1e-5, f"relative L2 {error:.1e}")
    status, err = attempt("video", at("latent.safetensors"), "-o", at("clip/"), "--vae", at("pipe"))
    check("text, dit, osp sample, video: a whole pass", None if not os.path.exists(osp) else status == 0)


if __name__ == "__main__":
    for sig in (signal.SIGTERM, signal.SIGHUP):                  # so that a half-written file is removed
        signal.signal(sig, lambda n, _: sys.exit(128 + n))
    sys.exit(main())
