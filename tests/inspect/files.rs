//! Files to inspect, and what a run says of them.

use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
};
use tempfile::TempDir;

pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name).with_extension("safetensors")
}

/// Standard output of a run that has nothing to complain about.
pub fn text(output: Output) -> String {
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && complaint.is_empty(), "{}: {complaint}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// The run failed with this code and one line that holds `needles`.
#[track_caller]
pub fn assert_complains(output: Output, code: i32, needles: &[&str]) {
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{complaint}");
    assert!(complaint.starts_with("error: ") && complaint.ends_with('\n'), "{complaint:?}");
    assert_eq!(complaint.matches('\n').count(), 1, "{complaint:?}");
    assert!(output.stdout.is_empty());
    for needle in needles {
        assert!(complaint.contains(needle), "{needle:?} is not in {complaint:?}");
    }
}

/// A directory of files to inspect.
pub struct Files(pub TempDir);

impl Files {
    pub fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }
}

/// A safetensors file with this header and data.
pub fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// A safetensors file of F32 tensors, and spaces to bring its data to any address.
pub fn file(tensors: &[(&str, &[f32])], padding: usize) -> Vec<u8> {
    let (mut header, mut data) = (json!({}), Vec::new());
    for (name, elements) in tensors {
        let start = data.len();
        data.extend(elements.iter().flat_map(|x| x.to_le_bytes()));
        header[*name] = json!({"dtype": "F32", "shape": [elements.len()], "data_offsets": [start, data.len()]});
    }
    raw(&format!("{header}{:padding$}", ""), &data)
}
