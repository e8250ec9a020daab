//! `benches/record.py`: that the README says of speed what the newest record and the kernels give; and how a record is
//! made and shown, on figures of an invented GPU.

mod require;

use require::skipped;
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};
use tempfile::TempDir;

const BEFORE: &str = "# A README\n\nText before.\n\n<!-- speed -->\n";
const AFTER: &str = "<!-- /speed -->\n\nText after.\n";

/// Runs the script; none if there is no Python.
fn record(arguments: &[&Path]) -> Option<Output> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/record.py");
    let output = Command::new("python3").arg(script).args(arguments).env("PYTHONIOENCODING", "utf-8").output();
    match output {
        Ok(output) => Some(output),
        Err(error) => {
            skipped(require::PYTHON, &format!("there is no python3: {error}"));
            None
        }
    }
}

/// What it printed, if it succeeded.
#[track_caller]
fn printed(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// What it said when it failed: one line.
#[track_caller]
fn refused(output: &Output) -> String {
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    assert!(output.status.code() == Some(1) && said.lines().count() == 1, "{:?}: {said}", output.status);
    said
}

/// A checkout with a README and a kernel, and beside it the logs of a run on an invented GPU.
struct Checkout(TempDir);

impl Checkout {
    fn new() -> Self {
        let checkout = Self(TempDir::new().unwrap());
        checkout.write("README.md", &format!("{BEFORE}{AFTER}"));
        checkout.write("kernels/example.cu", "// An invented kernel.\n");
        checkout
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, content: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// What the README has between its marks; the rest must be as it was.
    #[track_caller]
    fn block(&self) -> String {
        let readme = self.read("README.md");
        let block = readme.strip_prefix(BEFORE).and_then(|rest| rest.strip_suffix(AFTER));
        block.unwrap_or_else(|| panic!("text outside the block has changed:\n{readme}")).to_owned()
    }

    /// A bench with five samples around a median in ns.
    fn bench(&self, id: &str, median: u64, bytes: Option<u64>) {
        let throughput = bytes.map(|bytes| json!({ "BytesDecimal": bytes }));
        let folder = format!("logs/criterion/{id}/new");
        self.write(&format!("{folder}/benchmark.json"), &json!({"full_id": id, "throughput": throughput}).to_string());
        let times: Vec<u64> = [80, 90, 100, 110, 120].map(|percent| 2 * median * percent / 100).into();
        self.write(&format!("{folder}/sample.json"), &json!({"iters": [2, 2, 2, 2, 2], "times": times}).to_string());
    }

    /// The kernels' hash as the script says it.
    fn hash(&self) -> Option<String> {
        Some(printed(&record(&[Path::new("hash"), Path::new("--root"), self.0.path()])?).trim().to_owned())
    }

    /// What every record needs: the GPU and the build.
    fn built(&self) -> Option<()> {
        let gpu = json!({"name": "Example GPU (invented)", "driver_version": "1.2.3", "clocks.sm": "1000 MHz"});
        let build = json!({"commit": "0123456789abcdef", "dirty": false, "kernels": self.hash()?, "nvcc": null});
        self.write("logs/gpu.json", &gpu.to_string());
        self.write("logs/build.json", &build.to_string());
        Some(())
    }

    fn make(&self) -> Option<Output> {
        let [gpu, criterion, peers, build, parts, counters] =
            ["gpu.json", "criterion", "peers.json", "build.json", "parts.json", "counters.json"]
                .map(|name| self.path("logs").join(name));
        let out = self.path("benches/records");
        record(&[Path::new("make"), &gpu, &criterion, &peers, &build, &parts, &counters, &out])
    }

    fn readme(&self, option: &str) -> Option<Output> {
        record(&[Path::new("readme"), Path::new("--root"), self.0.path(), Path::new(option)])
    }

    /// The only record.
    fn record(&self) -> (PathBuf, Value) {
        let folder = self.path("benches/records/example-gpu-invented");
        let files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        let [file] = files.as_slice() else { panic!("{files:?}") };
        (file.clone(), serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap())
    }
}

/// A run in which some goals are met and others missed.
fn whole_run() -> Option<Checkout> {
    let checkout = Checkout::new();
    checkout.built()?;
    checkout.bench("ceiling/sum", 1_000_000, Some(4_000_000_000)); // 4 TB/s
    checkout.bench("ceiling/scale", 1_000_000, Some(2_000_000_000)); // 2 TB/s
    checkout.bench("measure/f32", 500_000, Some(1_000_000_000)); // half of the ceiling: missed
    checkout.bench("measure/bf16", 250_000, Some(1_000_000_000)); // all of it
    checkout.bench("step/clips", 2_000_000, Some(1_000_000_000)); // at the ceilings 250 + 1000 µs
    checkout.bench("small/graph", 10_000, None);
    checkout.bench("small/host", 20_000, None); // missed
    let times = |median: u64| json!({"median_ns": median, "p10_ns": median, "p90_ns": median, "samples": 5});
    let peers = json!({
        "software": {"torch": "0.0.0", "cuda": null},
        "cases": {
            "measure/f32": {"norm": 2.0, "peers": {"torch norm": times(1_000_000), "torch statistics": times(5_000_000)}},
            "measure/bf16": {"norm": 3.0, "peers": {"torch norm": times(1_000_000)}},
            "step/clips": {"norm": 1.0, "peers": {"clip_grad_norm_": times(6_000_000), "get_total_norm": times(1_000_000)}},
        },
        "left_out": [{"case": "measure/f32", "peer": "cupy sum", "why": "an invented reason"}],
    });
    checkout.write("logs/peers.json", &peers.to_string());
    checkout.write(
        "logs/criterion/norms.json",
        &json!({"measure/f32": 2.000001, "measure/bf16": 4.0, "step/clips": 1.0}).to_string(),
    );
    let parts = json!({"tests": {"result": "passed", "seconds": 3}, "racecheck": {"result": "failed", "seconds": 1}});
    checkout.write("logs/parts.json", &parts.to_string());
    let clip = |bytes: u64| json!({"name": "gradprobe_clip", "dram__bytes_read.sum": bytes});
    let counters = json!({"kernels": [clip(50_000_000), {"name": "gradprobe_measure"}, clip(5_000_000)]});
    checkout.write("logs/counters.json", &counters.to_string());
    Some(checkout)
}

/// The cells of a markdown table's rows.
fn cells(block: &str) -> Vec<Vec<&str>> {
    let rows = block.lines().filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"));
    rows.map(|row| row.split(" | ").map(str::trim).collect()).collect()
}

#[test]
fn the_readme_says_what_the_newest_record_and_the_kernels_give() {
    if let Some(output) = record(&[Path::new("readme"), Path::new("--check")]) {
        printed(&output);
    }
}

#[test]
fn a_record_has_every_ratio_with_its_goal() {
    let Some(checkout) = whole_run() else { return };
    let shown = printed(&checkout.make().unwrap());
    assert!(shown.contains("left out: measure/f32, cupy sum: an invented reason"), "{shown}");
    let (_, record) = checkout.record();
    assert_eq!(
        record["ours"]["measure/f32"],
        json!({"median_ns": 500_000.0, "p10_ns": 420_000.0, "p90_ns": 580_000.0, "samples": 5, "bytes": 1_000_000_000})
    );

    let ratio = |case: &str, against: &str| {
        let rows = record["ratios"].as_array().unwrap();
        let row = rows.iter().find(|row| row["case"] == case && row["against"] == against);
        let row = row.unwrap_or_else(|| panic!("no {case} against {against}"));
        (row["value"].as_f64(), row["met"].as_bool())
    };
    assert_eq!(ratio("measure/f32", "its ceiling"), (Some(0.5), Some(false)));
    assert_eq!(ratio("measure/bf16", "its ceiling"), (Some(1.0), Some(true)));
    assert_eq!(ratio("step/clips", "its ceiling"), (Some(0.625), None));
    assert_eq!(ratio("measure/f32", "torch norm"), (Some(2.0), Some(true)));
    assert_eq!(ratio("measure/f32", "torch statistics"), (Some(10.0), Some(false)));
    assert_eq!(ratio("step/clips", "clip_grad_norm_"), (Some(3.0), Some(true)));
    assert_eq!(ratio("step/clips", "get_total_norm"), (Some(0.5), None));
    assert_eq!(ratio("small/graph", "time"), (Some(10_000.0), Some(true)));
    assert_eq!(ratio("small/host", "time"), (Some(20_000.0), Some(false)));
    // Of the last clip.
    assert_eq!(ratio("cached/step", "second pass from HBM"), (Some(0.1), Some(true)));
    // The norms say that ours and theirs had other data.
    assert_eq!(ratio("measure/bf16", "torch norm"), (None, None));
    assert!(shown.contains("measure/bf16: not compared"), "{shown}");
    // No peer in a graph, no step that does not clip.
    assert_eq!(ratio("small/graph", "clip_grad_norm_"), (None, None));
    assert_eq!(ratio("step/does-not-clip", "clip_grad_norm_"), (None, None));
}

#[test]
fn the_readme_shows_a_record() {
    let Some(checkout) = whole_run() else { return };
    printed(&checkout.make().unwrap());
    assert!(refused(&checkout.readme("--check").unwrap()).contains("README.md: not what the newest record"));
    printed(&checkout.readme("--no-plot").unwrap());
    printed(&checkout.readme("--check").unwrap());

    let (block, (_, record)) = (checkout.block(), checkout.record());
    let date = &record["date"].as_str().unwrap()[..10];
    for text in
        ["Example GPU (invented)", "driver 1.2.3", date, "commit 0123456789ab", "torch 0.0.0", "racecheck failed"]
    {
        assert!(block.contains(text), "no {text}:\n{block}");
    }
    let rows = cells(&block);
    for row in [
        ["ceiling/sum", "1.00 ms", "4.00", "", "", "", ""],
        ["measure/f32", "500.0 µs", "2.00", "its ceiling", "0.500", "≥ 0.950", "MISSED"],
        ["", "", "", "torch norm, 1.00 ms", "2 ×", "≥ 1.5 ×", "met"],
        ["", "", "", "torch statistics, 5.00 ms", "10 ×", "≥ 30 ×", "MISSED"],
        ["step/clips", "2.00 ms", "1.50", "clip_grad_norm_, 6.00 ms", "3 ×", "≥ 2 ×", "met"],
        ["measure/f16", "not measured", "", "its ceiling", "not measured", "≥ 0.950", ""],
        ["small/host", "20.0 µs", "", "time", "20.0 µs", "≤ 15.0 µs", "MISSED"],
        ["cached/step", "not measured", "", "second pass from HBM", "10 %", "≤ 20 %", "met"],
    ] {
        assert!(rows.contains(&row.to_vec()), "no {row:?}:\n{block}");
    }

    // A newer record takes its place, whatever the GPU.
    let mut newer = record.clone();
    newer["date"] = "2999-01-01T00:00:00Z".into();
    newer["gpu"]["name"] = "Example GPU 2 (invented)".into();
    checkout.write("benches/records/a/2999-01-01.json", &newer.to_string());
    printed(&checkout.readme("--no-plot").unwrap());
    assert!(checkout.block().contains("Example GPU 2 (invented), driver 1.2.3, 2999-01-01"));
}

#[test]
fn a_record_of_other_kernels_is_said_to_be_older() {
    let Some(checkout) = whole_run() else { return };
    printed(&checkout.make().unwrap());
    printed(&checkout.readme("--no-plot").unwrap());
    assert!(!checkout.block().contains("older than the kernels"));
    for (file, text) in [("example.cu", "// A faster one.\n"), ("new.cuh", "")] {
        checkout.write(&format!("kernels/{file}"), text);
        printed(&checkout.readme("--no-plot").unwrap());
        assert!(checkout.block().contains("**This record is older than the kernels**"), "{}", checkout.block());
    }
    // What is no kernel changes nothing.
    let before = checkout.hash();
    checkout.write("kernels/README.md", "Text.\n");
    assert_eq!(checkout.hash(), before);
}

#[test]
fn what_was_not_measured_has_no_number() {
    let checkout = Checkout::new();
    if checkout.built().is_none() {
        return;
    }
    printed(&checkout.make().unwrap());
    let (_, record) = checkout.record();
    for row in record["ratios"].as_array().unwrap() {
        assert!(row["value"].is_null() && row["met"].is_null(), "{row}");
    }
    printed(&checkout.readme("--no-plot").unwrap());
    let block = checkout.block();
    let rows = cells(&block);
    assert!(rows.len() > 15 && block.contains("The suite in that run: not measured."), "{block}");
    for row in &rows[1..] {
        assert!(row[0].is_empty() || row[1] == "not measured", "{row:?}");
        assert!(row[3].is_empty() || row[4] == "not measured", "{row:?}");
    }
}

#[test]
fn without_a_record_no_speed_is_claimed() {
    let checkout = Checkout::new();
    let Some(output) = checkout.readme("--no-plot") else { return };
    printed(&output);
    assert!(checkout.block().contains("no speed on a GPU is claimed") && !checkout.block().contains("|"));
}

#[test]
fn a_file_that_is_not_whole_is_refused_by_name() {
    let Some(checkout) = whole_run() else { return };
    printed(&checkout.make().unwrap());
    let (path, mut record) = checkout.record();
    let whole = fs::read_to_string(&path).unwrap();
    let name = path.file_name().unwrap().to_str().unwrap();
    for end in [0, 1, whole.len() / 2, whole.len() - 3] {
        fs::write(&path, &whole.as_bytes()[..end]).unwrap();
        let said = refused(&checkout.readme("--no-plot").unwrap());
        assert!(said.contains(name) && said.contains("not whole"), "{end}: {said}");
    }
    record.as_object_mut().unwrap().remove("ratios");
    fs::write(&path, record.to_string()).unwrap();
    let said = refused(&checkout.readme("--no-plot").unwrap());
    assert!(said.contains(name) && said.ends_with("without ratios\n"), "{said}");
    checkout.block();

    checkout.write("logs/peers.json", "{");
    assert!(refused(&checkout.make().unwrap()).contains("peers.json: not whole"));
    fs::remove_file(checkout.path("logs/build.json")).unwrap();
    assert!(refused(&checkout.make().unwrap()).contains("build.json is missing"));
}

#[test]
fn counters_are_read_from_what_ncu_prints() {
    let checkout = Checkout::new();
    let (output, counters) = (checkout.path("ncu.csv"), checkout.path("counters.json"));
    let read = |text: &str| {
        fs::write(&output, text).unwrap();
        record(&[Path::new("counters"), &output, &counters])
    };
    let head = "==PROF== Connected\n\"ID\",\"Kernel Name\",\"Metric Name\",\"Metric Unit\",\"Metric Value\"\n";
    let rows = "\"0\",\"gradprobe_clip\",\"dram__bytes_read.sum\",\"byte\",\"1,000,000\"\n\
                \"0\",\"gradprobe_clip\",\"dram__bytes_write.sum\",\"byte\",\"n/a\"\n";
    let Some(result) = read(&format!("{head}{rows}")) else { return };
    printed(&result);
    let kernel = json!({"name": "gradprobe_clip", "dram__bytes_read.sum": 1_000_000, "dram__bytes_write.sum": null});
    assert_eq!(serde_json::from_str::<Value>(&checkout.read("counters.json")).unwrap(), json!({ "kernels": [kernel] }));

    assert!(refused(&read("==ERROR== no permission\n").unwrap()).contains("no permission"));
    assert!(refused(&read(head).unwrap()).contains("counted nothing"));
    let scaled = rows.replace("\"byte\"", "\"Mbyte\"");
    assert!(refused(&read(&format!("{head}{scaled}")).unwrap()).contains("--print-units base"));
}
