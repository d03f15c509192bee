//! A tensor as bytes.

use half::{bf16, f16};

use super::{Dtype, Result, TensorFileError, byte_length};

/// A tensor as a file has it: little-endian bytes, the last dimension running fastest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawTensor {
    /// The type of the elements.
    pub dtype: Dtype,
    /// The shape; empty for a single value.
    pub shape: Vec<usize>,
    /// The elements.
    pub bytes: Vec<u8>,
}

impl RawTensor {
    /// An F32 tensor.
    ///
    /// # Panics
    /// If there are not as many values as the shape says.
    pub fn from_f32(shape: Vec<usize>, values: Vec<f32>) -> Self {
        assert_count(&shape, values.len());
        Self { dtype: Dtype::F32, shape, bytes: to_bytes(&values, |value| value.to_le_bytes()) }
    }

    /// An I64 tensor.
    ///
    /// # Panics
    /// If there are not as many values as the shape says.
    pub fn from_i64(shape: Vec<usize>, values: Vec<i64>) -> Self {
        assert_count(&shape, values.len());
        Self { dtype: Dtype::I64, shape, bytes: to_bytes(&values, |value| value.to_le_bytes()) }
    }

    /// The values of a tensor of floats; F64 is rounded to the nearest.
    ///
    /// # Errors
    /// [`TensorFileError::Conversion`] if the elements are no floats, or the bytes do not fit the shape.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        self.check("f32 values")?;
        match self.dtype {
            Dtype::F32 => Ok(self.map(f32::from_le_bytes)),
            Dtype::F64 => Ok(self.map(|bytes| f64::from_le_bytes(bytes) as f32)),
            Dtype::F16 => Ok(self.map(|bytes| f16::from_le_bytes(bytes).to_f32())),
            Dtype::BF16 => Ok(self.map(|bytes| bf16::from_le_bytes(bytes).to_f32())),
            _ => Err(self.cannot_become("f32 values")),
        }
    }

    /// The values of a tensor of integers or truth values.
    ///
    /// # Errors
    /// [`TensorFileError::Conversion`] if the elements are floats, one of them is too large, or the bytes do not fit
    /// the shape.
    pub fn to_i64(&self) -> Result<Vec<i64>> {
        const WANTED: &str = "i64 values";
        self.check(WANTED)?;
        match self.dtype {
            Dtype::I64 => Ok(self.map(i64::from_le_bytes)),
            Dtype::I32 => Ok(self.map(|bytes| i32::from_le_bytes(bytes).into())),
            Dtype::I16 => Ok(self.map(|bytes| i16::from_le_bytes(bytes).into())),
            Dtype::I8 => Ok(self.map(|bytes| i8::from_le_bytes(bytes).into())),
            Dtype::U32 => Ok(self.map(|bytes| u32::from_le_bytes(bytes).into())),
            Dtype::U16 => Ok(self.map(|bytes| u16::from_le_bytes(bytes).into())),
            Dtype::U8 | Dtype::Bool => Ok(self.map(|bytes| u8::from_le_bytes(bytes).into())),
            Dtype::U64 => self
                .map(|bytes| i64::try_from(u64::from_le_bytes(bytes)))
                .into_iter()
                .collect::<std::result::Result<_, _>>()
                .map_err(|_| self.cannot_become(WANTED)),
            _ => Err(self.cannot_become(WANTED)),
        }
    }

    /// The same tensor in F16, each value rounded to the nearest (what is beyond 65504 becomes infinite); integers
    /// stay as they are.
    pub fn to_f16_raw(&self) -> Self {
        let values: Vec<f16> = match self.dtype {
            Dtype::F32 => self.map(|bytes| f16::from_f32(f32::from_le_bytes(bytes))),
            // by way of f32, as PyTorch does it and every machine does alike
            Dtype::F64 => self.map(|bytes| f16::from_f32(f64::from_le_bytes(bytes) as f32)),
            Dtype::BF16 => self.map(|bytes| f16::from_f32(bf16::from_le_bytes(bytes).to_f32())),
            _ => return self.clone(),
        };
        let bytes = to_bytes(&values, |value| value.to_le_bytes());
        Self { dtype: Dtype::F16, shape: self.shape.clone(), bytes }
    }

    /// The same tensor in BF16, each value rounded to the nearest; integers stay as they are.
    pub fn to_bf16_raw(&self) -> Self {
        let values: Vec<bf16> = match self.dtype {
            Dtype::F32 => self.map(|bytes| bf16::from_f32(f32::from_le_bytes(bytes))),
            Dtype::F64 => self.map(|bytes| bf16::from_f32(f64::from_le_bytes(bytes) as f32)),
            Dtype::F16 => self.map(|bytes| bf16::from_f32(f16::from_le_bytes(bytes).to_f32())),
            _ => return self.clone(),
        };
        let bytes = to_bytes(&values, |value| value.to_le_bytes());
        Self { dtype: Dtype::BF16, shape: self.shape.clone(), bytes }
    }

    fn map<const N: usize, T>(&self, convert: impl Fn([u8; N]) -> T) -> Vec<T> {
        let (elements, _) = self.bytes.as_chunks();
        elements.iter().map(|element| convert(*element)).collect()
    }

    fn check(&self, wanted: &'static str) -> Result<()> {
        match byte_length(&self.shape, self.dtype) == Some(self.bytes.len()) {
            true => Ok(()),
            false => Err(self.cannot_become(wanted)),
        }
    }

    fn cannot_become(&self, wanted: &'static str) -> TensorFileError {
        TensorFileError::Conversion { shape: self.shape.clone(), dtype: self.dtype, wanted }
    }
}

fn to_bytes<const N: usize, T>(values: &[T], convert: impl Fn(&T) -> [u8; N]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * N];
    for (place, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
        *place = convert(value);
    }
    bytes
}

fn assert_count(shape: &[usize], found: usize) {
    let expected: usize = shape.iter().product();
    assert_eq!(found, expected, "shape {shape:?} has {expected} elements, found {found} values");
}

/// The elements of a strided view, one after the other. `strides` count elements; every index must lie in `source`.
pub(super) fn gather(source: &[u8], size: usize, shape: &[usize], strides: &[usize]) -> Vec<u8> {
    let count: usize = shape.iter().product();
    let mut bytes = Vec::with_capacity(count * size);
    let mut index = vec![0; shape.len()];
    let mut position = 0;
    for _ in 0..count {
        bytes.extend_from_slice(&source[position * size..(position + 1) * size]);
        // counts up like an odometer, the last dimension first
        for (axis, place) in index.iter_mut().enumerate().rev() {
            *place += 1;
            position += strides[axis];
            if *place < shape[axis] {
                break;
            }
            position -= *place * strides[axis];
            *place = 0;
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_floats_become_f32_and_nothing_else_does() {
        let tensor = |dtype, bytes: &[u8]| RawTensor { dtype, shape: vec![1], bytes: bytes.to_vec() };
        assert_eq!(tensor(Dtype::F64, &0.1_f64.to_le_bytes()).to_f32().unwrap(), [0.1]);
        assert_eq!(tensor(Dtype::F16, &[0x00, 0xc1]).to_f32().unwrap(), [-2.5]);
        assert_eq!(tensor(Dtype::BF16, &[0x20, 0xc0]).to_f32().unwrap(), [-2.5]);
        for dtype in Dtype::ALL.into_iter().filter(|dtype| !dtype.is_float()) {
            let zero = tensor(dtype, &vec![0; dtype.size()]);
            assert!(zero.to_f32().is_err());
            assert_eq!(zero.to_i64().unwrap(), [0]);
        }
        assert!(tensor(Dtype::F32, &[0; 4]).to_i64().is_err());
        assert!(tensor(Dtype::F32, &[0; 8]).to_f32().is_err());
        assert_eq!(tensor(Dtype::I8, &[0xff]).to_i64().unwrap(), [-1]);
        assert!(tensor(Dtype::U64, &[0xff; 8]).to_i64().is_err());
    }

    #[test]
    fn half_precision_rounds_to_the_nearest() {
        let values = RawTensor::from_f32(vec![3], vec![1.0 + 2.0_f32.powi(-11), 70000.0, -1.5]).to_f16_raw();
        assert_eq!(values.to_f32().unwrap(), [1.0, f32::INFINITY, -1.5]);
        let double = RawTensor { dtype: Dtype::F64, shape: vec![], bytes: 0.1_f64.to_le_bytes().to_vec() };
        assert_eq!(
            double.to_f16_raw(),
            RawTensor { dtype: Dtype::F16, shape: vec![], bytes: vec![0x66, 0x2e] }
        );
        let integers = RawTensor::from_i64(vec![2], vec![1, 2]);
        assert_eq!(integers.to_f16_raw(), integers);
        assert_eq!(integers.to_bf16_raw(), integers);
        let brain = RawTensor::from_f32(vec![3], vec![1.0 + 2.0_f32.powi(-9), 70000.0, -1.5]).to_bf16_raw();
        assert_eq!((brain.dtype, brain.to_f32().unwrap()), (Dtype::BF16, vec![1.0, 70144.0, -1.5]));
        assert_eq!(brain.to_bf16_raw(), brain);
    }

    #[test]
    fn strided_views_are_gathered() {
        let source: Vec<u8> = (0..12).collect();
        assert_eq!(gather(&source, 1, &[4, 3], &[1, 4]), [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]);
        assert_eq!(gather(&source, 2, &[2, 1, 2], &[3, 7, 1]), [0, 1, 2, 3, 6, 7, 8, 9]);
        assert_eq!(gather(&source, 4, &[], &[]), [0, 1, 2, 3]);
    }
}
