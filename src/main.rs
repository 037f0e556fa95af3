//! The program: reads the command line and does what it says. Everything else is in the library.

use mlx_pipe::cli::{self, Command};
use mlx_pipe::{commands, doctor, session};
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = cli::parse();
    match cli.command {
        None => session::run(&cli.run, None).into(),
        Some(Command::Serve(options)) => session::run(&options.run, Some(&options.server)).into(),
        Some(Command::Doctor(options)) => doctor::run(&options).into(),
        Some(Command::Plan(options)) => commands::finish(|| commands::plan(&options)),
        Some(Command::Import { gguf, out_dir }) => {
            commands::finish(|| commands::import(&gguf, &out_dir))
        }
    }
}
