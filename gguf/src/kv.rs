//! Metadata values: their types, and arrays as borrowed slices that are decoded while iterating.
//!
//! An [`ArrayView`] of a parsed file was walked once by [`crate::Gguf::parse`]; its iterators yield exactly `len` items.

use alloc::vec::Vec;
use core::fmt;
use core::marker::PhantomData;

use crate::error::GgufError;
use crate::limits;
use crate::raw::{Encode, Endian, Reader};

/// The type of a value, with the numbers that files use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
#[allow(missing_docs)] // the names say it
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    Str = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    const ALL: [(ValueType, &'static str, &'static str, u64); 13] = [
        (ValueType::U8, "u8", "array of u8", 1),
        (ValueType::I8, "i8", "array of i8", 1),
        (ValueType::U16, "u16", "array of u16", 2),
        (ValueType::I16, "i16", "array of i16", 2),
        (ValueType::U32, "u32", "array of u32", 4),
        (ValueType::I32, "i32", "array of i32", 4),
        (ValueType::F32, "f32", "array of f32", 4),
        (ValueType::Bool, "bool", "array of bool", 1),
        (ValueType::Str, "str", "array of str", 8),
        (ValueType::Array, "array", "array of arrays", 4 + 8),
        (ValueType::U64, "u64", "array of u64", 8),
        (ValueType::I64, "i64", "array of i64", 8),
        (ValueType::F64, "f64", "array of f64", 8),
    ];

    fn from_number(number: u32) -> Option<ValueType> {
        Self::ALL.get(usize::try_from(number).ok()?).map(|row| row.0)
    }

    /// Its name: "u32", "str", "array".
    pub fn name(self) -> &'static str {
        Self::ALL[self as usize].1
    }

    /// The name of an array of it.
    pub fn array_name(self) -> &'static str {
        Self::ALL[self as usize].2
    }

    /// Bytes of an element; the fewest, for strings and arrays.
    fn min_bytes(self) -> u64 {
        Self::ALL[self as usize].3
    }

    fn is_integer(self) -> bool {
        use ValueType::*;
        matches!(self, U8 | I8 | U16 | I16 | U32 | I32 | U64 | I64)
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A metadata value. Strings are bytes: vocabularies hold pieces of characters.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)] // the names say it
pub enum Value<'a> {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Str(&'a [u8]),
    Array(ArrayView<'a>),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl<'a> Value<'a> {
    /// Its type.
    pub fn value_type(&self) -> ValueType {
        match self {
            Value::U8(_) => ValueType::U8,
            Value::I8(_) => ValueType::I8,
            Value::U16(_) => ValueType::U16,
            Value::I16(_) => ValueType::I16,
            Value::U32(_) => ValueType::U32,
            Value::I32(_) => ValueType::I32,
            Value::F32(_) => ValueType::F32,
            Value::Bool(_) => ValueType::Bool,
            Value::Str(_) => ValueType::Str,
            Value::Array(_) => ValueType::Array,
            Value::U64(_) => ValueType::U64,
            Value::I64(_) => ValueType::I64,
            Value::F64(_) => ValueType::F64,
        }
    }

    /// The name of its type; of an array, with the elements' type.
    pub fn type_name(&self) -> &'static str {
        match self {
            Value::Array(view) => view.elem_type().array_name(),
            other => other.value_type().name(),
        }
    }

    /// The value if it is an integer of any width.
    pub fn as_integer(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(v) => v.into(),
            Value::I8(v) => v.into(),
            Value::U16(v) => v.into(),
            Value::I16(v) => v.into(),
            Value::U32(v) => v.into(),
            Value::I32(v) => v.into(),
            Value::U64(v) => v.into(),
            Value::I64(v) => v.into(),
            _ => return None,
        })
    }

    /// The next value: its type, then itself. Of an array only the head is read; the reader then stands at its first
    /// element.
    pub(crate) fn read(reader: &mut Reader<'a>, key: &'a str) -> Result<Self, GgufError> {
        let value_type = read_type(reader, key)?;
        Self::read_as(value_type, reader, key)
    }

    fn read_as(value_type: ValueType, reader: &mut Reader<'a>, key: &'a str) -> Result<Self, GgufError> {
        const WHAT: &str = "a metadata value";
        Ok(match value_type {
            ValueType::U8 => Value::U8(reader.number(WHAT)?),
            ValueType::I8 => Value::I8(reader.number(WHAT)?),
            ValueType::U16 => Value::U16(reader.number(WHAT)?),
            ValueType::I16 => Value::I16(reader.number(WHAT)?),
            ValueType::U32 => Value::U32(reader.number(WHAT)?),
            ValueType::I32 => Value::I32(reader.number(WHAT)?),
            ValueType::F32 => Value::F32(reader.number(WHAT)?),
            ValueType::Bool => {
                let offset = reader.pos();
                match reader.number::<u8>(WHAT)? {
                    0 => Value::Bool(false),
                    1 => Value::Bool(true),
                    got => return Err(GgufError::InvalidBool { key: key.into(), offset, got }),
                }
            }
            ValueType::Str => Value::Str(reader.string("a metadata string")?),
            ValueType::Array => Value::Array(ArrayView::read(reader, key)?),
            ValueType::U64 => Value::U64(reader.number(WHAT)?),
            ValueType::I64 => Value::I64(reader.number(WHAT)?),
            ValueType::F64 => Value::F64(reader.number(WHAT)?),
        })
    }

    /// Appends the value without its type.
    pub(crate) fn encode(&self, endian: Endian, out: &mut Vec<u8>) -> Result<(), GgufError> {
        match *self {
            Value::U8(v) => v.encode(endian, out),
            Value::I8(v) => v.encode(endian, out),
            Value::U16(v) => v.encode(endian, out),
            Value::I16(v) => v.encode(endian, out),
            Value::U32(v) => v.encode(endian, out),
            Value::I32(v) => v.encode(endian, out),
            Value::F32(v) => v.encode(endian, out),
            Value::Bool(v) => v.encode(endian, out),
            Value::Str(v) => v.encode(endian, out),
            Value::Array(view) => {
                (view.elem as u32).encode(endian, out);
                (view.len as u64).encode(endian, out);
                let n_bytes = view.n_bytes()?;
                if view.reader.endian() == endian {
                    out.extend_from_slice({ view.reader }.take(n_bytes, "array elements")?);
                } else {
                    view.iter().try_for_each(|elem| elem.encode(endian, out))?;
                }
            }
            Value::U64(v) => v.encode(endian, out),
            Value::I64(v) => v.encode(endian, out),
            Value::F64(v) => v.encode(endian, out),
        }
        Ok(())
    }
}

fn read_type(reader: &mut Reader<'_>, key: &str) -> Result<ValueType, GgufError> {
    let offset = reader.pos();
    let got = reader.number::<u32>("a value type")?;
    ValueType::from_number(got).ok_or_else(|| GgufError::UnknownValueType { key: key.into(), offset, got })
}

/// An array that lies in the file.
#[derive(Clone, Copy)]
pub struct ArrayView<'a> {
    key: &'a str,
    elem: ValueType,
    len: usize,
    /// At the first element.
    reader: Reader<'a>,
}

impl<'a> ArrayView<'a> {
    /// The head of the next array; the elements are not looked at.
    fn read(reader: &mut Reader<'a>, key: &'a str) -> Result<Self, GgufError> {
        let elem = read_type(reader, key)?;
        let len = reader.count(elem.min_bytes(), "number of array elements")?;
        // A count that passed fits what is left of a slice, so it fits usize.
        Ok(ArrayView { key, elem, len: len as usize, reader: *reader })
    }

    /// Type of the elements.
    pub fn elem_type(&self) -> ValueType {
        self.elem
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Offset of the first element in the file.
    pub fn offset(&self) -> u64 {
        self.reader.pos()
    }

    /// The elements, whatever their type.
    pub fn iter(&self) -> Elems<'a> {
        Elems { key: self.key, elem: self.elem, left: self.len, reader: self.reader }
    }

    /// The strings. Wrong type if it holds anything else.
    pub fn strs(&self) -> Result<Strs<'a>, GgufError> {
        match self.elem {
            ValueType::Str => Ok(Strs { left: self.len, reader: self.reader }),
            _ => Err(self.wrong_type(ValueType::Str)),
        }
    }

    /// The numbers or booleans, converted: an integer of any width fits any other if its value does. Checked here
    /// for all elements, so that the iteration itself cannot fail.
    pub fn numbers<T: Number>(&self) -> Result<Numbers<'a, T>, GgufError> {
        if !T::accepts(self.elem) {
            return Err(self.wrong_type(T::TYPE));
        }
        if self.elem != T::TYPE {
            for value in self.iter() {
                convert::<T>(self.key, &value)?;
            }
        }
        Ok(Numbers { elems: self.iter(), converted: PhantomData })
    }

    /// [`Self::numbers`] as u32.
    pub fn u32s(&self) -> Result<Numbers<'a, u32>, GgufError> {
        self.numbers()
    }

    /// [`Self::numbers`] as i32.
    pub fn i32s(&self) -> Result<Numbers<'a, i32>, GgufError> {
        self.numbers()
    }

    /// [`Self::numbers`] as f32.
    pub fn f32s(&self) -> Result<Numbers<'a, f32>, GgufError> {
        self.numbers()
    }

    /// [`Self::numbers`] as bool.
    pub fn bools(&self) -> Result<Numbers<'a, bool>, GgufError> {
        self.numbers()
    }

    /// Walks the array, checks every element, and says how many bytes they take.
    pub(crate) fn n_bytes(&self) -> Result<u64, GgufError> {
        let mut reader = self.reader;
        self.check(&mut reader, 1)?;
        Ok(reader.pos() - self.reader.pos())
    }

    fn check(&self, reader: &mut Reader<'a>, depth: u32) -> Result<(), GgufError> {
        let len = self.len as u64;
        match self.elem {
            ValueType::Bool => {
                for _ in 0..len {
                    Value::read_as(ValueType::Bool, reader, self.key)?;
                }
            }
            ValueType::Str => {
                for _ in 0..len {
                    reader.string("a string in an array")?;
                }
            }
            ValueType::Array => {
                for _ in 0..len {
                    let offset = reader.pos();
                    if depth == limits::MAX_NESTING {
                        return Err(GgufError::TooDeep { key: self.key.into(), offset });
                    }
                    ArrayView::read(reader, self.key)?.check(reader, depth + 1)?;
                }
            }
            plain => {
                // Cannot overflow: `len * min_bytes` was compared with the bytes left when the count was read.
                reader.take(len.saturating_mul(plain.min_bytes()), "array elements")?;
            }
        }
        Ok(())
    }

    fn wrong_type(&self, expected: ValueType) -> GgufError {
        GgufError::WrongType {
            key: self.key.into(),
            expected: expected.array_name(),
            found: self.elem.array_name(),
        }
    }
}

impl PartialEq for ArrayView<'_> {
    /// Same element type and equal elements, wherever they lie and in whatever byte order.
    fn eq(&self, other: &Self) -> bool {
        self.elem == other.elem && self.len == other.len && self.iter().eq(other.iter())
    }
}

impl fmt::Debug for ArrayView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ArrayView")
            .field("elem", &self.elem)
            .field("len", &self.len)
            .field("offset", &self.offset())
            .finish()
    }
}

/// Iterator over the elements of an array, as values.
#[derive(Clone)]
pub struct Elems<'a> {
    key: &'a str,
    elem: ValueType,
    left: usize,
    reader: Reader<'a>,
}

impl<'a> Iterator for Elems<'a> {
    type Item = Value<'a>;

    fn next(&mut self) -> Option<Value<'a>> {
        self.left = self.left.checked_sub(1)?;
        let value = Value::read_as(self.elem, &mut self.reader, self.key).ok()?;
        if let Value::Array(inner) = value {
            self.reader.take(inner.n_bytes().ok()?, "array elements").ok()?;
        }
        Some(value)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Elems<'_> {}

/// Iterator over the strings of an array.
#[derive(Clone)]
pub struct Strs<'a> {
    left: usize,
    reader: Reader<'a>,
}

impl<'a> Iterator for Strs<'a> {
    type Item = &'a [u8];

    #[inline]
    fn next(&mut self) -> Option<&'a [u8]> {
        self.left = self.left.checked_sub(1)?;
        self.reader.string("a string in an array").ok()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Strs<'_> {}

/// Iterator over the numbers of an array, converted to `T`.
#[derive(Clone)]
pub struct Numbers<'a, T> {
    elems: Elems<'a>,
    converted: PhantomData<T>,
}

impl<T: Number> Iterator for Numbers<'_, T> {
    type Item = T;

    #[inline]
    fn next(&mut self) -> Option<T> {
        T::from_value(&self.elems.next()?)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.elems.size_hint()
    }
}

impl<T: Number> ExactSizeIterator for Numbers<'_, T> {}

mod sealed {
    /// Keeps the traits here to the types here.
    #[allow(private_bounds)]
    pub trait Sealed: crate::raw::Encode {}
}

/// What a number or boolean in a file converts to: every integer type, f32, f64, bool.
pub trait Number: Copy + sealed::Sealed {
    /// The file's type for it.
    const TYPE: ValueType;
    /// Whether values of that type can convert, if they fit.
    fn accepts(from: ValueType) -> bool;
    /// The value, if its type is accepted and it fits.
    fn from_value(value: &Value<'_>) -> Option<Self>;
    /// As a value of its own type.
    fn to_value(self) -> Value<'static>;
}

/// `value` as a `T`, or what is wrong with it.
pub(crate) fn convert<T: Number>(key: &str, value: &Value<'_>) -> Result<T, GgufError> {
    T::from_value(value).ok_or_else(|| match value.as_integer() {
        Some(got) if T::accepts(value.value_type()) => {
            GgufError::OutOfRange { key: key.into(), expected: T::TYPE.name(), got }
        }
        _ => GgufError::WrongType { key: key.into(), expected: T::TYPE.name(), found: value.type_name() },
    })
}

macro_rules! number {
    ($($ty:ident $variant:ident $accepts:expr, $from:expr;)*) => {$(
        impl sealed::Sealed for $ty {}
        impl Number for $ty {
            const TYPE: ValueType = ValueType::$variant;
            fn accepts(from: ValueType) -> bool {
                $accepts(from)
            }
            fn from_value(value: &Value<'_>) -> Option<Self> {
                $from(value)
            }
            fn to_value(self) -> Value<'static> {
                Value::$variant(self)
            }
        }
        impl From<$ty> for Value<'_> {
            fn from(value: $ty) -> Self {
                value.to_value()
            }
        }
    )*};
}

fn integer<T: TryFrom<i128>>(value: &Value<'_>) -> Option<T> {
    T::try_from(value.as_integer()?).ok()
}

fn float(value: &Value<'_>) -> Option<f64> {
    match *value {
        Value::F32(v) => Some(v.into()),
        Value::F64(v) => Some(v),
        _ => None,
    }
}

fn boolean(value: &Value<'_>) -> Option<bool> {
    match *value {
        Value::Bool(v) => Some(v),
        _ => None,
    }
}

fn is_float(value_type: ValueType) -> bool {
    matches!(value_type, ValueType::F32 | ValueType::F64)
}

number! {
    u8 U8 ValueType::is_integer, integer;
    i8 I8 ValueType::is_integer, integer;
    u16 U16 ValueType::is_integer, integer;
    i16 I16 ValueType::is_integer, integer;
    u32 U32 ValueType::is_integer, integer;
    i32 I32 ValueType::is_integer, integer;
    u64 U64 ValueType::is_integer, integer;
    i64 I64 ValueType::is_integer, integer;
    // An f64 rounds to f32: hyperparameters have no more than f32's precision.
    f32 F32 is_float, |value: &Value<'_>| float(value).map(|v| v as f32);
    f64 F64 is_float, float;
    bool Bool |from| from == ValueType::Bool, boolean;
}

impl<'a> From<&'a str> for Value<'a> {
    fn from(value: &'a str) -> Self {
        Value::Str(value.as_bytes())
    }
}

impl<'a> From<&'a [u8]> for Value<'a> {
    fn from(value: &'a [u8]) -> Self {
        Value::Str(value)
    }
}

impl<'a> From<&'a Array> for Value<'a> {
    fn from(value: &'a Array) -> Self {
        Value::Array(value.view())
    }
}

/// An array made here, to be written: the bytes a little-endian file would hold.
#[derive(Clone, Debug)]
pub struct Array {
    elem: ValueType,
    len: usize,
    bytes: Vec<u8>,
}

impl Array {
    /// An array of numbers or booleans.
    pub fn numbers<T: Number>(items: &[T]) -> Array {
        let mut bytes = Vec::with_capacity(size_of_val(items));
        items.iter().for_each(|&item| item.encode(Endian::Little, &mut bytes));
        Array { elem: T::TYPE, len: items.len(), bytes }
    }

    /// An array of strings.
    pub fn strs<S: AsRef<[u8]>>(items: &[S]) -> Array {
        let mut bytes = Vec::new();
        items.iter().for_each(|item| item.as_ref().encode(Endian::Little, &mut bytes));
        Array { elem: ValueType::Str, len: items.len(), bytes }
    }

    /// An array of arrays. An error if that nests too deep.
    pub fn nested(items: &[Array]) -> Result<Array, GgufError> {
        let mut bytes = Vec::new();
        items.iter().try_for_each(|item| Value::from(item).encode(Endian::Little, &mut bytes))?;
        let array = Array { elem: ValueType::Array, len: items.len(), bytes };
        array.view().n_bytes()?;
        Ok(array)
    }

    /// As a view, like one of a file.
    pub fn view(&self) -> ArrayView<'_> {
        ArrayView {
            key: "",
            elem: self.elem,
            len: self.len,
            reader: Reader::at(&self.bytes, 0, Endian::Little),
        }
    }
}
