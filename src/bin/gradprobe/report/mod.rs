//! `gradprobe report`: a run, or two to compare, as one page for the browser that needs no network.

mod buckets;
mod causes;
mod summary;

use crate::{failure::Failure, run::file_of};
use clap::Args;
use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
};
use summary::{ALL_CELLS, Summary};

/// Make one HTML file of a run, for a browser: findings, curves, a heat map of the tensors, histograms
#[derive(Debug, Args)]
pub struct Options {
    /// A folder with steps.jsonl, or such a file
    run: PathBuf,
    /// Second run, shown beside it
    other: Option<PathBuf>,
    /// File to make
    #[arg(short, long, default_value = "report.html")]
    pub output: PathBuf,
    /// Replace a file that is there
    #[arg(long)]
    force: bool,
}

/// Makes the page.
pub fn run(options: &Options) -> Result<(), Failure> {
    let paths: Vec<&Path> =
        [Some(&options.run), options.other.as_ref()].into_iter().flatten().map(AsRef::as_ref).collect();
    make(&paths, &options.output, options.force)
}

/// Makes the page of these runs, one or two.
pub fn make(paths: &[&Path], output: &Path, force: bool) -> Result<(), Failure> {
    // Before gigabytes are read; checked again in case it appears meanwhile.
    if !force && output.exists() {
        return Err(Failure::file(output, EXISTS));
    }
    let is_output =
        |run: &&Path| output.canonicalize().ok().is_some_and(|it| file_of(run).canonicalize().ok() == Some(it));
    if paths.iter().any(is_output) {
        return Err(Failure::file(output, "is the run itself"));
    }
    let runs = paths.iter().map(|run| Summary::read(run, ALL_CELLS / paths.len())).collect::<Result<Vec<_>, _>>()?;
    if let [run, other] = &runs[..]
        && let Some(name) = run.differs_from(other)
    {
        return Err(Failure::Mismatch(format!("no tensor is in both runs: {} has no {name:?}", paths[1].display())));
    }
    write(output, &page(&runs), force).map_err(|error| Failure::file(output, error))
}

const EXISTS: &str = "is there already; --force replaces it";

/// Makes the page, which contains everything: it loads nothing.
fn page(runs: &[Summary]) -> String {
    // No `</script>` and no `<!--` of a name ends the data: in JSON, `<` is within strings only.
    let data = serde_json::to_string(runs).expect("strings, numbers and lists of them").replace('<', r"\u003c");
    let parts = [
        ("%LICENCE%", include_str!("uplot/LICENSE")),
        ("%UPLOT.CSS%", include_str!("uplot/uPlot.min.css")),
        ("%PAGE.CSS%", include_str!("page.css")),
        ("%UPLOT.JS%", include_str!("uplot/uPlot.iife.min.js")),
        ("%PAGE.JS%", include_str!("page.js")),
        // Last, so that no text in it is taken for a placeholder.
        ("%DATA%", &data),
    ];
    parts.iter().fold(include_str!("page.html").to_owned(), |page, (place, part)| page.replacen(place, part, 1))
}

/// Writes the file, whole or not at all.
fn write(output: &Path, page: &str, force: bool) -> std::io::Result<()> {
    let folder = output.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Made by `File::create_new` for the permissions of an ordinary file; removed when dropped.
    let mut temporary = tempfile::Builder::new().prefix(".report-").make_in(folder, |path| File::create_new(path))?;
    temporary.write_all(page.as_bytes())?;
    let placed = if force { temporary.persist(output) } else { temporary.persist_noclobber(output) };
    placed.map(drop).map_err(|error| match error.error.kind() {
        std::io::ErrorKind::AlreadyExists => std::io::Error::other(EXISTS),
        _ => error.error,
    })
}
