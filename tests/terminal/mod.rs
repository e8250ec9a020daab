//! Programs in a pseudoterminal.

use crate::require::{PYTHON, skipped};
use std::{path::Path, process::Command};

/// Runs a program in a pseudoterminal of 40 lines, types `keys` as soon as it has shown `awaited`, and gives what the terminal
/// was sent and the exit status; none without Python.
#[track_caller]
pub fn run(command: &[&Path], awaited: &str, keys: &str) -> Option<(String, i64)> {
    let code = "
import fcntl, json, os, pty, select, struct, sys, termios, time
awaited, keys, *command = sys.argv[1:]
child, terminal = pty.fork()
if child == 0:
    os.environ['TERM'] = 'xterm-256color'
    os.execv(command[0], command)
fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 120, 0, 0))
sent, typed, deadline = b'', False, time.time() + 60
while time.time() < deadline:
    if select.select([terminal], [], [], 0.2)[0]:
        try:
            part = os.read(terminal, 65536)
        except OSError:
            break
        if not part:
            break
        sent += part
    if not typed and awaited.encode() in sent:
        typed = True
        os.write(terminal, keys.encode())
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps([sent.decode(errors='replace'), status]))
";
    let output = match Command::new("python3").args(["-c", code, awaited, keys]).args(command).output() {
        Ok(output) => output,
        Err(error) => {
            skipped(PYTHON, &format!("there is no python3: {error}"));
            return None;
        }
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let read: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    Some((read[0].as_str().unwrap().to_owned(), read[1].as_i64().unwrap()))
}
