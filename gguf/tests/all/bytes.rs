//! Builds files byte by byte, right or wrong, without the crate's writer, and remembers where each field lies.

use gguf::Endian;

/// A number in the file that steers the reader.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    pub what: &'static str,
    pub at: usize,
    pub width: usize,
}

#[derive(Clone)]
pub struct Bytes {
    pub out: Vec<u8>,
    pub fields: Vec<Field>,
    pub endian: Endian,
}

impl Bytes {
    /// The header.
    pub fn new(version: u32, endian: Endian, n_tensors: u64, n_kvs: u64) -> Bytes {
        let mut file = Bytes { out: b"GGUF".to_vec(), fields: vec![], endian };
        file.field_u32("version", version);
        file.field_u64("n_tensors", n_tensors);
        file.field_u64("n_kvs", n_kvs);
        file
    }

    pub fn v3(n_tensors: u64, n_kvs: u64) -> Bytes {
        Self::new(3, Endian::Little, n_tensors, n_kvs)
    }

    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.out.extend_from_slice(bytes);
        self
    }

    pub fn u32(&mut self, value: u32) -> &mut Self {
        let bytes = if self.endian == Endian::Little { value.to_le_bytes() } else { value.to_be_bytes() };
        self.raw(&bytes)
    }

    pub fn u64(&mut self, value: u64) -> &mut Self {
        let bytes = if self.endian == Endian::Little { value.to_le_bytes() } else { value.to_be_bytes() };
        self.raw(&bytes)
    }

    pub fn field_u32(&mut self, what: &'static str, value: u32) -> &mut Self {
        self.fields.push(Field { what, at: self.out.len(), width: 4 });
        self.u32(value)
    }

    pub fn field_u64(&mut self, what: &'static str, value: u64) -> &mut Self {
        self.fields.push(Field { what, at: self.out.len(), width: 8 });
        self.u64(value)
    }

    pub fn string(&mut self, what: &'static str, text: &[u8]) -> &mut Self {
        self.field_u64(what, text.len() as u64).raw(text)
    }

    /// Key and type; the value is to follow.
    pub fn key(&mut self, key: &str, value_type: u32) -> &mut Self {
        self.string("key length", key.as_bytes()).field_u32("value type", value_type)
    }

    /// Head of an array; the elements are to follow.
    pub fn array(&mut self, elem_type: u32, len: u64) -> &mut Self {
        self.field_u32("element type", elem_type).field_u64("array length", len)
    }

    pub fn tensor(&mut self, name: &str, ne: &[u64], format: u32, offset: u64) -> &mut Self {
        self.string("tensor name length", name.as_bytes()).field_u32("n_dims", ne.len() as u32);
        for &n in ne {
            self.field_u64("dimension", n);
        }
        self.field_u32("tensor type", format).field_u64("tensor offset", offset)
    }

    pub fn pad(&mut self, alignment: usize) -> &mut Self {
        self.out.resize(self.out.len().next_multiple_of(alignment), 0);
        self
    }
}

/// A small file with every type of value and three tensors; `data_end` bytes are needed, the rest is padding.
pub fn every_type(version: u32, endian: Endian) -> (Bytes, usize) {
    let mut file = Bytes::new(version, endian, 3, 16);
    file.key("u8", 0).raw(&[200]).key("i8", 1).raw(&[0x80]);
    file.key("bool", 7).raw(&[1]);
    file.key("u32", 4).u32(7).key("i32", 5).u32(8).key("f32", 6).u32(1.5f32.to_bits());
    file.key("u64", 10).u64(9).key("i64", 11).u64(10).key("f64", 12).u64(0.1f64.to_bits());
    file.key("u16", 2).raw(&[1, 1]).key("i16", 3).raw(&[2, 2]);
    file.key("str", 8).string("string length", "grüße".as_bytes());
    file.key("strs", 9).array(8, 3);
    file.string("string length", b"a").string("string length", b"").string("string length", &[0xff, 0xfe]);
    file.key("u32s", 9).array(4, 2).u32(1).u32(2);
    file.key("bools", 9).array(7, 2).raw(&[0, 1]);
    file.key("nested", 9).array(9, 2).array(0, 1).raw(&[1]).array(8, 1).string("string length", b"x");
    file.tensor("f32", &[3, 2], 0, 0).tensor("q8_0", &[64], 8, 32).tensor("f16", &[5], 1, 128).pad(32);
    let data = file.out.len();
    file.raw(&[0; 24]).pad(32).raw(&[1; 68]).pad(32).raw(&[2; 10]);
    let data_end = file.out.len();
    file.pad(32);
    assert_eq!(data_end, data + 138);
    (file, data_end)
}
