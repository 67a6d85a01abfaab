"""llama.cpp itself, as the package xllamacpp ships it: its C functions by way of ctypes, on 64-bit x86 Linux.

xllamacpp's own classes take no control vectors. The layout of C++ arguments is that of VERSION.
"""

import ctypes
import importlib.metadata
import importlib.util
import platform
from ctypes import POINTER, Structure, c_char, c_char_p, c_float, c_int, c_int32, c_size_t, c_void_p
from pathlib import Path

import numpy as np
import pytest

VERSION = "2026.10.11549"
LOADER = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"


def library():
    """The shared library, or skip the test where it is not installed."""
    found = importlib.util.find_spec("xllamacpp")
    if not found or importlib.metadata.version("xllamacpp") != VERSION or platform.machine() != "x86_64":
        pytest.skip(f"needs xllamacpp {VERSION}, which is llama.cpp: pip install -e '.[interop]'")
    lib = ctypes.CDLL(str(next(Path(found.origin).parent.glob("xllamacpp*.so"))))
    quiet(lib)
    return lib


class Settings(Structure):
    """Room for any of llama.cpp's structures of settings, which are passed on as they came."""
    _fields_ = [("bytes", c_char * 1024)]


class Batch(Structure):
    _fields_ = [("n_tokens", c_int32), *((f"array{i}", c_void_p) for i in range(6))]


class Vector(Structure):
    """std::vector"""
    _fields_ = [("begin", c_void_p), ("end", c_void_p), ("end_of_room", c_void_p)]


class LoadInfo(Structure):
    """common_control_vector_load_info; a std::string of the older kind is a pointer to its characters"""
    _fields_ = [("strength", c_float), ("fname", c_char_p)]


class Loaded(Structure):
    """common_control_vector_data"""
    _fields_ = [("n_embd", c_int), ("data", Vector)]


LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
SILENT = LOG(lambda *_: None)


def call(lib, name, result, *arguments):
    """Call a function of the library with arguments as pairs of a type and a value."""
    function = lib[name]
    function.restype, function.argtypes = result, [kind for kind, _ in arguments]
    return function(*(value for _, value in arguments))


def quiet(lib):
    call(lib, "llama_log_set", None, (LOG, SILENT), (c_void_p, None))


class LlamaCpp:
    """A model in a GGUF file. vector: a control vector's file, which llama.cpp reads and adds"""

    def __init__(self, path, n_layer):
        self.lib, self.n_layer = library(), n_layer
        settings = call(self.lib, "llama_model_default_params", Settings)
        self.model = call(self.lib, "llama_model_load_from_file", c_void_p, (c_char_p, str(path).encode()),
                          (Settings, settings))
        assert self.model, "llama.cpp does not read the model"
        vocabulary = call(self.lib, "llama_model_get_vocab", c_void_p, (c_void_p, self.model))
        self.n_vocab = call(self.lib, "llama_vocab_n_tokens", c_int, (c_void_p, vocabulary))

    def start(self, vector=None):
        """-> a new context, in which the directions of the file `vector` are added"""
        settings = call(self.lib, "llama_context_default_params", Settings)
        context = call(self.lib, "llama_init_from_model", c_void_p, (c_void_p, self.model),
                       (Settings, settings))
        if vector:
            info, loaded = LoadInfo(1.0, str(vector).encode()), Loaded()
            begin, end = ctypes.addressof(info), ctypes.addressof(info) + ctypes.sizeof(info)
            files = Vector(begin, end, end)
            call(self.lib, LOADER, None, (c_void_p, ctypes.addressof(loaded)),
                 (c_void_p, ctypes.addressof(files)))
            assert loaded.n_embd > 0, "llama.cpp does not read the control vector"
            fault = call(self.lib, "llama_set_adapter_cvec", c_int, (c_void_p, context),
                         (c_void_p, loaded.data.begin),
                         (c_size_t, (loaded.data.end - loaded.data.begin) // 4), (c_int, loaded.n_embd),
                         (c_int, 1), (c_int, self.n_layer))
            assert not fault
        return context

    def logits(self, ids, context):
        """Of the last of `ids`, which follow those that the context has read -> (n_vocab,)"""
        array = (c_int32 * len(ids))(*ids)
        batch = call(self.lib, "llama_batch_get_one", Batch, (c_void_p, array), (c_int, len(ids)))
        assert not call(self.lib, "llama_decode", c_int, (c_void_p, context), (Batch, batch))
        found = call(self.lib, "llama_get_logits_ith", POINTER(c_float), (c_void_p, context), (c_int, -1))
        return np.ctypeslib.as_array(found, (self.n_vocab,)).copy()

    def greedy(self, ids, n, vector=None):
        """The n likeliest next ids, one after another"""
        context, new = self.start(vector), []
        for _ in range(n):
            new.append(int(self.logits(new[-1:] or ids, context).argmax()))
        call(self.lib, "llama_free", None, (c_void_p, context))
        return new
