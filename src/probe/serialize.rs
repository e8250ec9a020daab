//! Serializes numbers as their bits and lists as bytes, in the machine's byte order. Every format keeps all values, NaN
//! among them, and a list takes no more than its elements.

/// A list as bytes.
pub(crate) mod bytes {
    use crate::probe::values;
    use bytemuck::Pod;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use serde_bytes::ByteBuf;

    pub fn serialize<T: Pod, S: Serializer>(list: &[T], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytemuck::cast_slice(list))
    }

    pub fn deserialize<'de, T: Pod, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
        let bytes = ByteBuf::deserialize(deserializer)?;
        if bytes.len().is_multiple_of(size_of::<T>()) {
            return Ok(values(&bytes));
        }
        Err(D::Error::invalid_length(bytes.len(), &"the bytes of whole elements"))
    }
}

/// A number as its bits.
pub(crate) mod bits {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(number: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(number.to_bits())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        u64::deserialize(deserializer).map(f64::from_bits)
    }
}
