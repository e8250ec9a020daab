//! `gradprobe`: inspects gradients and runs from the command line.

mod compare;
mod device;
mod failure;
mod files;
mod inspect;
mod live;
mod report;
mod run;
mod terminal;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use device::Device;
use std::process::ExitCode;

/// Measure the gradients of a training and say what is wrong with them
///
/// Exit code 0; 1 for an error, 2 for a command line that cannot be understood, each with one line on standard error; 3 for a
/// verdict that --fail-on names.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, subcommand_required = true, arg_required_else_help = false)]
struct Program {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Inspect {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        options: inspect::Options,
    },
    Compare {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        options: compare::Options,
    },
    Report(report::Options),
    Live(live::Options),
    /// Print a script that completes command lines
    Completions {
        #[arg(value_enum)]
        shell: Shell,
    },
    /// Print the manual, in the format of `man`
    Man,
}

#[derive(Debug, clap::Args)]
struct Place {
    /// Where numbers are computed [default: cuda when a GPU is there, else cpu]
    #[arg(long, value_enum)]
    device: Option<Device>,
}

fn main() -> ExitCode {
    terminal::run(|Program { command }: &mut Program| match command {
        Command::Inspect { place, options } => {
            inspect::run(options, &|plan, config| device::open(place.device, plan, config))
        }
        Command::Compare { place, options } => {
            compare::run(options, &|plan, config| device::open(place.device, plan, config)).map(|()| None)
        }
        Command::Report(options) => {
            report::run(options)?;
            terminal::print(&format!("{}\n", options.output.display())).map(|()| None)
        }
        Command::Live(options) => live::run(options).map(|()| None),
        Command::Completions { shell } => completions(*shell).map(|()| None),
        Command::Man => man().map(|()| None),
    })
}

fn completions(shell: Shell) -> Result<(), files::Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Program::command(), "gradprobe", &mut script);
    terminal::print(&String::from_utf8_lossy(&script))
}

/// The pages of the program and of its commands, one after the other.
fn man() -> Result<(), files::Failure> {
    let mut program = Program::command().disable_help_subcommand(true);
    program.build();
    let mut text = Vec::new();
    for page in std::iter::once(&program).chain(program.get_subcommands()) {
        clap_mangen::Man::new(page.clone()).render(&mut text).map_err(files::Failure::Output)?;
    }
    terminal::print(&String::from_utf8_lossy(&text))
}
