//! The texts of the code table, which `steadfast explain` prints: what they tell a person to type is
//! there to be typed.

#![allow(clippy::unwrap_used)] // A test may: clippy knows it of #[test] functions only.

use std::process::Command;

use steadfast_api::Code;

#[test]
fn every_command_that_a_code_names_exists() {
    let mut commands = 0;
    for code in Code::all() {
        let text = [code.title(), code.meaning(), code.fix()].join(" ");
        // Every second part stands between backticks.
        for quoted in text.split('`').skip(1).step_by(2) {
            let Some(command) = quoted.strip_prefix("steadfast ") else { continue };
            let words = command.split(' ').take_while(|word| !word.starts_with(['<', '-']));
            let mut steadfast = Command::new(env!("CARGO_BIN_EXE_steadfast"));
            let output = steadfast.args(words).arg("--help").output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{code} names `{quoted}`: {said}");
            commands += 1;
        }
    }
    assert!(commands > 3, "only {commands} commands were found");
}
