//! The PTX in a fat binary, as nvcc embeds it. NVIDIA does not document the format, and cuobjdump is not on every machine; a test
//! holds what is read here against what nvcc prints.
//!
//! A header of 16 bytes is followed by entries, each with a header of its own: u16 kind (1 is PTX), two bytes more, u32 size
//! of the header, u64 size of what follows it, u32 size of the compressed text in that; at byte 28 the architecture, at 40
//! flags, at 56 the size of the text.

use std::io::Read;

const MAGIC: u32 = 0xba55_ed50;
const KIND_PTX: u16 = 1;
/// A hundred times the text of today.
const MOST_BYTES: u64 = 1 << 28;
const COMPRESSED_ZSTD: u64 = 0x8000;
const COMPRESSED_LZ4: u64 = 0x2000;

/// Whether these bytes are a fat binary.
pub fn is_fatbin(image: &[u8]) -> bool {
    image.starts_with(&MAGIC.to_le_bytes())
}

/// All its bytes, by its header of 16.
pub fn length(header: &[u8]) -> usize {
    let behind = number(header, 8).map_or(0, u64::from_le_bytes) as usize;
    behind.saturating_add(number(header, 6).map_or(0, u16::from_le_bytes) as usize)
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// The first PTX in a fat binary.
///
/// # Errors
/// In words, when there is none or the format is another.
pub fn ptx(image: &[u8]) -> Result<String, String> {
    if !is_fatbin(image) {
        return Err("this is no fat binary".to_owned());
    }
    let cut = || "the fat binary is cut off".to_owned();
    let mut at = usize::from(u16::from_le_bytes(number(image, 6).ok_or_else(cut)?));
    while at < image.len() {
        let entry = &image[at..];
        let kind = u16::from_le_bytes(number(entry, 0).ok_or_else(cut)?);
        let header = u32::from_le_bytes(number(entry, 4).ok_or_else(cut)?) as usize;
        let size = u64::from_le_bytes(number(entry, 8).ok_or_else(cut)?) as usize;
        if header == 0 {
            return Err(cut());
        }
        if kind == KIND_PTX {
            let compressed = u32::from_le_bytes(number(entry, 16).ok_or_else(cut)?) as usize;
            let flags = u64::from_le_bytes(number(entry, 40).ok_or_else(cut)?);
            let payload = header.checked_add(size).and_then(|end| entry.get(header..end)).ok_or_else(cut)?;
            return text(payload, compressed, flags);
        }
        at = at.saturating_add(header).saturating_add(size);
    }
    Err("the fat binary has no PTX".to_owned())
}

fn text(payload: &[u8], compressed: usize, flags: u64) -> Result<String, String> {
    let mut bytes = Vec::new();
    if flags & COMPRESSED_LZ4 != 0 {
        return Err("the PTX is compressed by LZ4, as nvcc before 12.8 did it, which is not understood".to_owned());
    }
    if flags & COMPRESSED_ZSTD != 0 {
        let mut frame = payload.get(..compressed).ok_or("the PTX is cut off")?;
        let decoder = ruzstd::decoding::StreamingDecoder::new(&mut frame).map_err(|error| error.to_string())?;
        decoder.take(MOST_BYTES).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    } else {
        bytes.extend_from_slice(payload);
    }
    // Padded with zeros, as a string of C's.
    bytes.truncate(bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len()));
    String::from_utf8(bytes).map_err(|_| "the PTX is no text".to_owned())
}
