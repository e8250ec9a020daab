//! All pictures of a run, in a folder.

use super::{Chart, Course};
use crate::{
    Error, Plan, Verdict,
    write::{Entry, Sink, file},
};
use std::path::{Path, PathBuf};

/// Keeps the pictures of a run in a folder, each as SVG and, with the feature `png`, as PNG. `overview`,
/// `norm-by-depth` and `gsnr` show the last step that has their numbers; `norms` and `histograms` show all steps. They
/// are drawn when the run ends and, with [`every`](Self::every), now and then before. `first-critical`, an overview, is
/// drawn at the first critical step, so that later ones do not hide the beginning.
///
/// ```
/// # use gradprobe::{Config, Cpu, DType, Plan, Probe};
/// use gradprobe::write::{Entry, Sink, charts::ChartFolder};
///
/// # let mut probe = Probe::new(Cpu, Plan::new([("weight", DType::F32, 2)])?, Config::new())?;
/// # probe.measure(&[&[3.0f32, 4.0]])?;
/// let path = std::env::temp_dir().join(format!("gradprobe-charts-{}", std::process::id()));
/// let mut charts = ChartFolder::create(&path, probe.plan())?;
/// charts.write(&Entry::new(probe.wait()?))?;
/// charts.finish()?;
/// assert!(path.join("overview.svg").exists());
/// # std::fs::remove_dir_all(&path)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct ChartFolder {
    folder: PathBuf,
    course: Course,
    every: Option<u64>,
    entries: u64,
    last: Option<Entry>,
    /// The last with signal and noise.
    gsnr: Option<Entry>,
    was_critical: bool,
}

impl ChartFolder {
    /// Makes the folder if it is missing. Replaces pictures of the same names.
    ///
    /// # Errors
    /// [`Error::Unwritable`].
    pub fn create(folder: impl AsRef<Path>, plan: &Plan) -> Result<Self, Error> {
        let folder = folder.as_ref().to_owned();
        file::folder(&folder)?;
        file::check_folder_of(&folder.join("overview.svg"))?;
        let course = Course::new(plan);
        Ok(Self { folder, course, every: None, entries: 0, last: None, gsnr: None, was_critical: false })
    }

    /// Draws all pictures after every so many entries as well. That takes the writing thread about half a second.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for 0.
    pub fn every(self, entries: u64) -> Result<Self, Error> {
        if entries == 0 {
            return Err(Error::InvalidConfig { option: "every", expected: "at least 1", value: "0".to_owned() });
        }
        Ok(Self { every: Some(entries), ..self })
    }

    fn save(&self, name: &str, chart: &Chart) -> Result<(), Error> {
        #[cfg(feature = "png")]
        chart.save(self.folder.join(format!("{name}.png")))?;
        chart.save(self.folder.join(format!("{name}.svg")))
    }

    fn draw(&self) -> Result<(), Error> {
        if let Some(last) = &self.last {
            self.save("overview", &Chart::overview(last))?;
            self.save("norm-by-depth", &Chart::norm_by_depth(last))?;
        }
        if let Some(entry) = &self.gsnr {
            self.save("gsnr", &Chart::gsnr(entry))?;
        }
        self.save("norms", &self.course.norms())?;
        self.save("histograms", &self.course.histograms())
    }
}

impl Sink for ChartFolder {
    fn write(&mut self, entry: &Entry) -> Result<(), Error> {
        self.course.push(entry)?;
        self.entries += 1;
        if entry.gsnr().is_some() {
            self.gsnr = Some(entry.without_histogram());
        }
        self.last = Some(entry.without_histogram());
        if entry.verdict() == Some(Verdict::Critical) && !self.was_critical {
            self.was_critical = true;
            self.save("first-critical", &Chart::overview(entry))?;
        }
        match self.every {
            Some(every) if self.entries.is_multiple_of(every) => self.draw(),
            _ => Ok(()),
        }
    }

    fn finish(&mut self) -> Result<(), Error> {
        self.draw()
    }
}
