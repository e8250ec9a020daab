//! The pictures: well-formed SVG, PNGs that are not blank, the unhealthy in their colours, whatever the values and names.

use crate::entries::{deep, entries, host::OnHost};
use gradprobe::{
    Config, Cpu, Error, Plan, Probe,
    write::{
        Entry, Sink,
        charts::{Chart, ChartFolder, Course},
    },
};
use std::fs;
use tempfile::TempDir;

const HEALTHY: [u8; 3] = [0x4c, 0x78, 0xa8];
const WARNING: [u8; 3] = [0xf5, 0x85, 0x18];
const CRITICAL: [u8; 3] = [0xd6, 0x27, 0x28];
const NOT_FINITE: [u8; 3] = [0x8e, 0x44, 0xad];

/// No step is bad.
#[expect(clippy::reversed_empty_ranges, reason = "that is what it is for")]
const NEVER: std::ops::RangeInclusive<u64> = 1..=0;

/// A decoded picture.
struct Pixels {
    width: u32,
    pixels: Vec<[u8; 3]>,
}

impl Pixels {
    #[track_caller]
    fn of(chart: &Chart) -> Self {
        let file = chart.png().unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(file)).read_info().unwrap();
        let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut bytes).unwrap();
        assert_eq!((info.width, info.height), chart.size());
        assert_eq!((info.color_type, info.bit_depth), (png::ColorType::Rgba, png::BitDepth::Eight));
        Self { width: info.width, pixels: bytes.chunks(4).map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect() }
    }

    /// Pixels of a colour below the header, where the legend is.
    fn count(&self, colour: [u8; 3]) -> usize {
        self.pixels[64 * self.width as usize..].iter().filter(|&&pixel| pixel == colour).count()
    }

    fn is_blank(&self) -> bool {
        self.pixels[64 * self.width as usize..].iter().all(|&pixel| pixel == self.pixels[0])
    }
}

/// The texts of the SVG, which must be XML.
#[track_caller]
fn texts(chart: &Chart) -> Vec<String> {
    let svg = chart.svg();
    let document = roxmltree::Document::parse(&svg).unwrap();
    let root = document.root_element();
    assert_eq!(root.tag_name().name(), "svg");
    let size = [root.attribute("width"), root.attribute("height")].map(|x| x.unwrap().parse::<u32>().unwrap());
    assert_eq!((size[0], size[1]), chart.size());
    for node in document.descendants().filter(|node| node.is_element()) {
        for attribute in node.attributes().filter(|attribute| !matches!(attribute.name(), "font-family")) {
            assert!(!["NaN", "inf"].iter().any(|word| attribute.value().contains(word)), "{attribute:?}");
        }
    }
    let of_text =
        document.descendants().filter(|node| node.has_tag_name((root.tag_name().namespace().unwrap(), "text")));
    of_text.filter_map(|node| node.text()).map(|text| text.trim().to_owned()).collect()
}

fn course(entries: &[Entry]) -> Course {
    let plan = Plan::new(entries[0].report().tensors().map(|t| (t.name, t.dtype, t.record.count))).unwrap();
    let mut course = Course::new(&plan);
    entries.iter().for_each(|entry| course.push(entry).unwrap());
    course
}

/// Every picture of a run, by name.
fn charts(entries: &[Entry]) -> [(&'static str, Chart); 5] {
    let (last, course) = (entries.last().unwrap(), course(entries));
    [
        ("overview", Chart::overview(last)),
        ("norm-by-depth", Chart::norm_by_depth(last)),
        ("gsnr", Chart::gsnr(last)),
        ("norms", course.norms()),
        ("histograms", course.histograms()),
    ]
}

/// Draws everything, and leaves it in a folder if the environment names one, for who wants to look.
#[track_caller]
fn drawn(run: &str, entries: &[Entry]) -> Vec<(&'static str, Chart, Pixels, Vec<String>)> {
    let keep = std::env::var_os("GRADPROBE_CHARTS").map(std::path::PathBuf::from);
    charts(entries)
        .into_iter()
        .map(|(name, chart)| {
            let (pixels, texts) = (Pixels::of(&chart), texts(&chart));
            if let Some(folder) = &keep {
                fs::create_dir_all(folder).unwrap();
                chart.save(folder.join(format!("{run}-{name}.png"))).unwrap();
                chart.save(folder.join(format!("{run}-{name}.svg"))).unwrap();
            }
            (name, chart, pixels, texts)
        })
        .collect()
}

#[test]
fn a_run_that_goes_bad_shows_where() {
    for (name, _, pixels, texts) in
        drawn("bad", &deep(24, 40, 39..=40, |layer| format!("blocks.{layer}.mlp.fc1.weight")))
    {
        assert!(pixels.count(NOT_FINITE) > 100 || name == "gsnr", "{name}: what is not finite is not marked");
        match name {
            "overview" | "norm-by-depth" => {
                let worst = ["2 critical: blocks.1.mlp.fc1.weight, blocks.23.mlp.fc1.weight", "1 warning: blocks.22"];
                for part in worst {
                    assert!(texts.iter().any(|text| text.contains(part)), "{name}: {texts:?}");
                }
                assert!(pixels.count(HEALTHY) > 1000 && pixels.count(CRITICAL) > 50 && pixels.count(WARNING) > 5);
                for layer in 0..24 {
                    let label = format!("blocks.{layer}.mlp.fc1.weight");
                    assert!(texts.contains(&label), "{name}: no {label} in {texts:?}");
                }
                assert!(texts.iter().any(|text| text == "NaN"), "{name}: {texts:?}");
            }
            "gsnr" => assert!(texts.iter().any(|text| text.starts_with("noise scale")) && pixels.count(HEALTHY) > 1000),
            "norms" => assert!(texts.iter().any(|text| text == "total norm") && pixels.count(CRITICAL) > 20),
            _ => assert!(["NaN", "Inf", "0", "step", "40"].iter().all(|label| texts.iter().any(|text| text == label))),
        }
    }
}

#[test]
fn a_healthy_run_has_no_marks() {
    let entries = deep(3, 12, NEVER, |layer| layer.to_string());
    for (name, _, pixels, _) in drawn("healthy", &entries) {
        assert!(!pixels.is_blank(), "{name}");
        let marks = [WARNING, CRITICAL, NOT_FINITE].map(|colour| pixels.count(colour));
        assert_eq!(marks, [0, 0, 0], "{name}");
    }
}

#[test]
fn awkward_names_and_values_are_drawn() {
    for (name, _, pixels, texts) in drawn("awkward", &entries(5)) {
        assert!(!pixels.is_blank(), "{name}");
        if name == "overview" {
            for label in ["a \"quoted\", name", r"two\nlines\r\nand\n", "<b>&amp;</b>", "größe–∇∥{x=\"1\"}"] {
                assert_eq!(texts.iter().filter(|text| text == &label).count(), 4, "{label} is not in {texts:?}");
            }
        }
    }
}

#[test]
fn a_thousand_tensors_are_readable() {
    let name = |layer: usize| format!("transformer.encoder.layers.{layer}.self_attention.query_key_value.weight");
    for (name, chart, pixels, texts) in drawn("thousand", &deep(1000, 4, 4..=4, name)) {
        assert!(pixels.count(CRITICAL) > 5 || matches!(name, "gsnr" | "histograms"), "{name}: the critical is covered");
        let svg = chart.svg();
        assert!(svg.len() < 2_000_000, "{name}: {} bytes of SVG", svg.len());
        if name != "norms" && name != "histograms" {
            let labels = texts.iter().filter(|text| text.parse::<usize>().is_ok()).count();
            assert!((20..=300).contains(&labels), "{name}: {labels} labels");
            let pattern = "transformer.encoder.layers.*.self_attention.query_key_value.weight";
            assert!(texts.iter().any(|text| text == pattern), "{name}: {texts:?}");
        }
        // Labels below an axis keep apart, each with as much room as its letters are high.
        let document = roxmltree::Document::parse(&svg).unwrap();
        let upright = document
            .descendants()
            .filter(|node| node.attribute("transform").is_some_and(|transform| transform.starts_with("rotate")));
        let mut places: Vec<(f64, f64)> = upright
            .map(|node| ["y", "x"].map(|name| node.attribute(name).unwrap().parse::<f64>().unwrap()))
            .map(|[y, x]| (y, x))
            .collect();
        places.sort_by(|a, b| a.partial_cmp(b).unwrap());
        for pair in places.windows(2) {
            assert!(pair[0].0 != pair[1].0 || pair[1].1 - pair[0].1 >= 12.0, "{name}: {pair:?} overlap");
        }
    }
}

#[test]
fn pictures_of_nothing_say_so() {
    let mut probe =
        Probe::new(Cpu, Plan::new([] as [(&str, gradprobe::DType, u64); 0]).unwrap(), Config::default()).unwrap();
    let entries = [Entry::new(probe.measure_host(&[]).unwrap())];
    for (name, _, pixels, texts) in drawn("nothing", &entries) {
        assert!(!pixels.is_blank());
        assert_eq!(texts.iter().any(|text| text == "nothing to show"), name != "norms", "{name}: {texts:?}");
    }
    let plan = Plan::new([("w", gradprobe::DType::F32, 1)]).unwrap();
    let course = Course::new(&plan);
    for chart in [course.norms(), course.histograms()] {
        assert!(texts(&chart).iter().any(|text| text == "nothing to show"));
    }
}

#[test]
fn long_runs_are_thinned_and_keep_the_worst_step() {
    let entries = deep(4, 2500, 1201..=1201, |layer| layer.to_string());
    let mut course = course(&entries);
    for chart in [course.norms(), course.histograms()] {
        assert!(texts(&chart).iter().any(|text| text.starts_with("one of every")));
        assert!(Pixels::of(&chart).count(NOT_FINITE) > 0, "the bad step is gone");
        assert!(chart.svg().len() < 2_000_000);
    }
    // A run that was restarted.
    entries[..3].iter().for_each(|entry| course.push(entry).unwrap());
    for chart in [course.norms(), course.histograms()] {
        assert_eq!(Pixels::of(&chart).count(NOT_FINITE), 0);
        assert!(!texts(&chart).iter().any(|text| text.starts_with("one of every")));
    }
}

#[test]
fn a_folder_has_every_picture_in_both_formats() {
    let folder = TempDir::new().unwrap();
    let pictures = folder.path().join("pictures");
    let entries = deep(8, 6, 5..=6, |layer| layer.to_string());
    let plan = Plan::new(entries[0].report().tensors().map(|t| (t.name, t.dtype, t.record.count))).unwrap();
    let mut sink = ChartFolder::create(&pictures, &plan).unwrap().every(4).unwrap();
    let present = || {
        let mut names: Vec<String> =
            fs::read_dir(&pictures).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    let of = |names: &[&str]| -> Vec<String> {
        names.iter().flat_map(|name| ["png", "svg"].map(|ending| format!("{name}.{ending}"))).collect()
    };
    entries[..3].iter().for_each(|entry| sink.write(entry).unwrap());
    assert_eq!(present(), [""; 0]);
    sink.write(&entries[3]).unwrap();
    assert_eq!(present(), of(&["gsnr", "histograms", "norm-by-depth", "norms", "overview"]));
    sink.write(&entries[4]).unwrap();
    assert_eq!(present(), of(&["first-critical", "gsnr", "histograms", "norm-by-depth", "norms", "overview"]));
    sink.write(&entries[5]).unwrap();
    sink.finish().unwrap();
    let read = |name: &str| fs::read_to_string(pictures.join(name)).unwrap();
    assert!(read("first-critical.svg").contains("step 5") && read("overview.svg").contains("step 6"));

    let other = deep(2, 1, NEVER, |layer| layer.to_string());
    let refused = sink.write(&other[0]).unwrap_err();
    assert!(matches!(refused, Error::EntryOfAnotherPlan { entry: "course", .. }), "{refused}");
    fs::remove_dir_all(&pictures).unwrap();
    assert!(matches!(sink.finish(), Err(Error::Unwritable { path, .. }) if path.starts_with(&pictures)));
    fs::write(&pictures, "a file").unwrap();
    assert!(matches!(ChartFolder::create(&pictures, &plan), Err(Error::Unwritable { path, .. }) if path == pictures));
}
