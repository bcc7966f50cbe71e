"""Makes the .gguf files here with PyPI `gguf` (0.19) and numpy: an implementation that is not ours.

    python3 make.py        # in this folder
"""
import numpy as np
from gguf import GGMLQuantizationType, GGUFEndian, GGUFWriter


def metadata(w):
    w.add_uint8("u8", 200); w.add_int8("i8", -100)
    w.add_uint16("u16", 60000); w.add_int16("i16", -30000)
    w.add_uint32("u32", 4000000000); w.add_int32("i32", -2000000000)
    w.add_float32("f32", 1.5); w.add_bool("bool", True); w.add_string("str", "grüße")
    w.add_uint64("u64", 2**63 + 1); w.add_int64("i64", -(2**62)); w.add_float64("f64", 0.1)
    w.add_array("strs", ["a", "", "ß", "longer"])
    w.add_array("i32s", [-1, 0, 7]); w.add_array("f32s", [0.5, -2.0]); w.add_array("bools", [True, False, True])


def tensors(w):
    w.add_tensor("f32", np.arange(6, dtype=np.float32).reshape(2, 3))
    w.add_tensor("f16", np.arange(5, dtype=np.float16))
    w.add_tensor("i32", np.arange(24, dtype=np.int32).reshape(2, 3, 4))
    w.add_tensor("scalar", np.array(2.5, dtype=np.float32))
    w.add_tensor("q8_0", np.zeros((3, 2 * 34), dtype=np.uint8), raw_dtype=GGMLQuantizationType.Q8_0)


def write(path, endian=GGUFEndian.LITTLE, alignment=None, **split):
    w = GGUFWriter(path, "llama", endianess=endian, **split)
    if alignment:
        w.add_custom_alignment(alignment)
    metadata(w)
    tensors(w)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()


write("le.gguf")
write("be.gguf", endian=GGUFEndian.BIG)
write("align64.gguf", alignment=64)
write("part.gguf", split_max_tensors=2)
