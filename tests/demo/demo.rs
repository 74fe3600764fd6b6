//! The demo for real: its numbers, and that it leaves nothing behind however it ends.
//!
//! Each test has a TMPDIR of its own, which its processes inherit: so what is left of
//! them is found by it.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, SystemTime};

use steadfast_test_rig::process::{binary_path, free_addr};
use tempfile::TempDir;

#[test]
fn no_request_fails_all_are_mutual_tls_and_every_svid_renews() {
    let scratch = scratch();
    let output = demo(&scratch, &["--for", "8s", "--svid-ttl", "5s", "--rate", "50", "--json"])
        .wait_with_output()
        .unwrap();
    let (stdout, stderr) = texts(&output);
    assert!(output.status.success(), "{stdout}{stderr}");
    let summary: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(summary["requests"], 400, "{summary}");
    assert_eq!(summary["failed"], 0, "{summary}");
    assert_eq!(summary["success_rate"], 1.0, "{summary}");
    assert_eq!(summary["mtls_rate"], 1.0, "{summary}");
    // Each of the three lives for 5 s and renews at 60 to 70 % of that.
    assert!(summary["svid_renewals"].as_u64() >= Some(3), "{summary}");
    assert_nothing_is_left(&scratch);
}

#[test]
fn every_rotation_is_performed_under_load_and_told_with_its_phases() {
    let scratch = scratch();
    let args = ["--rotate", "--read-lease", "3s", "--rate", "20", "--json"];
    let output = demo(&scratch, &args).wait_with_output().unwrap();
    let (stdout, stderr) = texts(&output);
    assert!(output.status.success(), "{stdout}{stderr}");
    let summary: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((&summary["failed"], &summary["mtls_rate"]), (&0.into(), &1.0.into()), "{summary}");
    let rotations = summary["rotations"].as_array().unwrap();
    let told: Vec<_> = rotations
        .iter()
        .map(|rotation| {
            let none = ["failed_requests", "restarts"].map(|name| rotation[name] == 0);
            assert_eq!(none, [true; 2], "{summary}");
            let phases = rotation["phases"].as_array().unwrap().iter();
            let names = phases.map(|phase| {
                assert!(phase["seconds"].as_f64() >= Some(0.0), "{summary}");
                phase["name"].as_str().unwrap()
            });
            (rotation["kind"].as_str().unwrap(), names.collect::<Vec<_>>())
        })
        .collect();
    let way = ["generating", "staged", "preparing", "activated", "draining"];
    let back = ["preparing", "activated", "draining", "withdrawn"];
    let urgent = ["preparing", "activated", "draining", "withdrawn"];
    let expected = [
        ("issuer", vec!["preparing"]),
        ("anchor", [&way[..], &["withdrawn"]].concat()),
        ("aborted", [&way[..], &back[..]].concat()),
        ("emergency", urgent.to_vec()),
    ];
    assert_eq!(told, expected, "{summary}");
    assert_nothing_is_left(&scratch);
}

#[test]
fn a_demo_that_is_interrupted_tells_which_rotations_are_over_and_is_no_success() {
    let scratch = scratch();
    let dir = scratch.path().join("mesh");
    let mesh = dir.to_str().unwrap();
    let args = ["--rotate", "--read-lease", "3s", "--rate", "20", "--json", "--dir", mesh];
    let demo = demo(&scratch, &args);
    until("the second rotation is under way", || {
        let (status, _) = texts(&steadfast(&["anchor", "status", "--dir", mesh, "-o", "json"]));
        let status: Option<serde_json::Value> = serde_json::from_str(&status).ok();
        status.is_some_and(|status| status["rotation"].is_object())
    });
    signal(demo.id(), "TERM");
    let output = demo.wait_with_output().unwrap();
    let (stdout, stderr) = texts(&output);
    assert_eq!(output.status.code(), Some(1), "{stdout}{stderr}");
    let summary: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    let rotations = summary["rotations"].as_array().unwrap();
    let kinds: Vec<_> = rotations.iter().map(|rotation| &rotation["kind"]).collect();
    assert_eq!(kinds, ["issuer"], "{summary}");
    assert!(stderr.contains("only 1 of 4 rotations were performed"), "{stderr}");
}

#[test]
fn nothing_is_left_of_a_demo_that_was_killed() {
    let scratch = scratch();
    let mut demo = demo(&scratch, &["--for", "60s"]);
    until("the demo is up", || processes_of(&scratch).len() >= PROCESSES);
    demo.kill().unwrap();
    demo.wait().unwrap();
    assert_nothing_is_left(&scratch);
}

#[test]
fn an_interrupt_at_any_stage_stops_everything() {
    // Two are the demo and its janitor; before, there is nothing to stop.
    for started in [2, 3, 6, PROCESSES] {
        let scratch = scratch();
        let demo = demo(&scratch, &["--for", "60s"]);
        until("so many have started", || processes_of(&scratch).len() >= started);
        signal(demo.id(), "INT");
        let output = demo.wait_with_output().unwrap();
        let (stdout, stderr) = texts(&output);
        assert!(output.status.code().is_some(), "{stdout}{stderr}");
        assert!(stdout.contains("nothing is left behind"), "{stdout}{stderr}");
        assert_nothing_is_left(&scratch);
    }
}

#[test]
fn a_process_that_dies_is_named_with_its_last_words() {
    let scratch = scratch();
    let mut demo = demo(&scratch, &["--for", "60s", "--svid-ttl", "10s"]);
    let mut stdout = demo.stdout.take().unwrap();
    let mut seen = String::new();
    until("a request has come through", || {
        let mut bytes = [0; 4096];
        let read = stdout.read(&mut bytes).unwrap();
        seen.push_str(&String::from_utf8_lossy(&bytes[..read]));
        seen.contains("first request")
    });
    let control = processes_of(&scratch).into_iter().find(|(_, c)| c.contains("steadfast-control"));
    signal(control.unwrap().0, "KILL");
    let output = demo.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(
        stderr.contains("steadfast-control was killed by signal 9; the last lines"),
        "{stderr}"
    );
    assert_nothing_is_left(&scratch);
}

#[test]
fn a_port_that_was_taken_meanwhile_is_answered_by_another_attempt() {
    let (scratch, programs) = (scratch(), tempfile::tempdir().unwrap());
    let (own, beside) = (&binary_path("steadfast"), programs.path());
    fs::copy(own, beside.join("steadfast")).unwrap();
    for program in ["steadfast-store", "steadfast-control", "steadfast-rotation", "steadfast-proxy"]
    {
        symlink(own.with_file_name(program), beside.join(program)).unwrap();
    }
    let script = format!(
        "#!/bin/sh\n[ -e {taken} ] && exec {identity} \"$@\"\n: > {taken}\n\
         echo 'cannot listen: Address already in use (os error 98)' >&2; exit 1\n",
        taken = beside.join("taken").display(),
        identity = own.with_file_name("steadfast-identity").display(),
    );
    fs::write(beside.join("steadfast-identity"), script).unwrap();
    let executable = fs::Permissions::from_mode(0o755);
    fs::set_permissions(beside.join("steadfast-identity"), executable).unwrap();
    let output = Command::new(beside.join("steadfast"))
        .args(["demo", "--for", "1s", "--rate", "20"])
        .env("TMPDIR", scratch.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let (stdout, stderr) = texts(&output);
    assert!(output.status.success(), "{stdout}{stderr}");
    assert!(stdout.contains("a port was taken meanwhile"), "{stdout}{stderr}");
    assert_nothing_is_left(&scratch);
}

#[test]
fn a_reader_that_goes_away_ends_the_demo() {
    let scratch = scratch();
    let mut demo = demo(&scratch, &[]);
    drop(demo.stdout.take());
    demo.wait().unwrap();
    assert_nothing_is_left(&scratch);
}

#[test]
fn a_kept_mesh_tells_who_its_workloads_are() {
    let scratch = scratch();
    let dir = scratch.path().join("mesh");
    let mesh = dir.to_str().unwrap();
    let demo = demo(&scratch, &["--keep", "--dir", mesh, "--rate", "20"]);
    until("a sidecar has its identity", || {
        steadfast(&["identity", "demo/api-0", "--dir", mesh, "--pem"]).status.success()
            && dir.join("env/web-proxy.env").exists()
    });
    let (table, _) = texts(&steadfast(&["identity", "api-0", "--dir", mesh]));
    for words in ["spiffe://cluster.local/ns/demo/sa/api", "next renewal", "trust anchor"] {
        assert!(table.contains(words), "{words} is not in\n{table}");
    }
    let (status, _) = texts(&steadfast(&["trust", "status", "--dir", mesh]));
    assert!(status.contains("standby") && status.contains("bundle seq 1"), "{status}");
    let (again, _) = texts(&steadfast(&["trust", "init", "--dir", mesh]));
    assert!(again.contains("exists already"), "{again}");
    let (_, other) = texts(&steadfast(&["trust", "init", "--dir", mesh, "--trust-domain", "x.y"]));
    assert!(other.contains("has the trust domain cluster.local already"), "{other}");
    let (_, unknown) = texts(&steadfast(&["identity", "db", "--dir", mesh]));
    assert!(unknown.contains("demo/web-0"), "{unknown}");
    let (_, busy) = texts(&steadfast(&["demo", "--dir", mesh]));
    assert!(busy.contains("a store runs in"), "{busy}");

    signal(demo.id(), "TERM");
    let output = demo.wait_with_output().unwrap();
    let (stdout, stderr) = texts(&output);
    assert!(output.status.success(), "{stdout}{stderr}");
    assert!(stdout.contains("LINKERD2_PROXY_IDENTITY_LOCAL_NAME='web.demo."), "{stdout}");
    assert!(dir.join("log/web-proxy.log").exists() && dir.join("manifests/demo.yaml").exists());
    assert!(!dir.join("store.sock").exists(), "the socket is left behind");
    until("no process is left", || processes_of(&scratch).is_empty());
}

#[test]
fn a_demo_in_a_mesh_of_ones_own_keeps_its_trust_domain_and_its_manifests() {
    let scratch = scratch();
    let dir = scratch.path().join("mesh");
    let mesh = dir.to_str().unwrap();
    let admin = free_addr().to_string();
    let mut store = Command::new(binary_path("steadfast-store"))
        .args(["--dir", mesh, "--admin", &admin])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (founded, why) =
        texts(&steadfast(&["trust", "init", "--dir", mesh, "--trust-domain", "x.y"]));
    signal(store.id(), "TERM");
    store.wait().unwrap();
    assert!(founded.contains("x.y has been founded"), "{founded}{why}");
    assert!(!dir.join("store.sock").exists(), "the store's socket is left behind");
    let manifest = dir.join("manifests/steadfast.yaml");
    let own = fs::read_to_string(&manifest).unwrap();

    let args = ["--dir", mesh, "--for", "1s", "--rate", "20"];
    let (stdout, stderr) = texts(&demo(&scratch, &args).wait_with_output().unwrap());
    assert!(stdout.contains("spiffe://x.y/ns/demo/sa/web"), "{stdout}{stderr}");
    assert!(stdout.contains("steadfast.yaml is not the demo's own and stays"), "{stdout}{stderr}");
    assert!(stdout.contains(" 0 failed"), "{stdout}{stderr}");
    assert_eq!(fs::read_to_string(&manifest).unwrap(), own);

    let services = dir.join("manifests/demo.yaml");
    fs::write(&services, "# mine\n").unwrap();
    let refused = demo(&scratch, &args).wait_with_output().unwrap();
    let (_, stderr) = texts(&refused);
    assert_eq!(refused.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("demo.yaml is not the demo's own"), "{stderr}");
    assert_eq!(fs::read_to_string(&services).unwrap(), "# mine\n");
}

#[test]
fn more_load_than_the_machine_can_send_ends_in_time_and_is_no_failure() {
    let scratch = scratch();
    let args = ["--for", "2s", "--rate", "20000", "--json"];
    let output = demo(&scratch, &args).wait_with_output().unwrap();
    let (stdout, stderr) = texts(&output);
    assert!(output.status.success(), "{stdout}{stderr}");
    let summary: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert!(stderr.contains("too slow for --rate 20000"), "{stdout}{stderr}");
    assert!(summary["requests"].as_u64() < Some(40_000), "{summary}");
    assert_eq!((&summary["failed"], &summary["success_rate"]), (&0.into(), &1.0.into()));
    // What was under way at the end had its own deadline, and no more was sent.
    assert!(summary["duration_s"].as_f64() < Some(2.0 + 10.0), "{summary}");
}

fn scratch() -> TempDir {
    for program in ["store", "identity", "control", "proxy"] {
        binary_path(&format!("steadfast-{program}"));
    }
    tempfile::Builder::new().prefix("steadfast-cli-").tempdir().unwrap()
}

fn demo(scratch: &TempDir, args: &[&str]) -> Child {
    command(&["demo"])
        .args(args)
        .env("TMPDIR", scratch.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn steadfast(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(binary_path("steadfast"));
    command.args(args).env_remove("STEADFAST_DIR").stdin(Stdio::null());
    command
}

fn texts(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

/// The processes that have this test's TMPDIR, with their command lines; zombies are none.
fn processes_of(scratch: &TempDir) -> Vec<(u32, String)> {
    let mark = format!("TMPDIR={}", scratch.path().display()).into_bytes();
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| {
        let dir = PathBuf::from(format!("/proc/{pid}"));
        let environ = fs::read(dir.join("environ")).ok()?;
        let ours = environ.split(|byte| *byte == 0).any(|variable| variable == mark);
        let command = fs::read_to_string(dir.join("cmdline")).ok()?.replace('\0', " ");
        (ours && !command.is_empty()).then_some((pid, command))
    })
    .collect()
}

fn assert_nothing_is_left(scratch: &TempDir) {
    until("no process is left", || processes_of(scratch).is_empty());
    until("no directory is left", || fs::read_dir(scratch.path()).unwrap().next().is_none());
}

fn signal(pid: u32, signal: &str) {
    let sent = Command::new("kill").args(["-s", signal, &pid.to_string()]).status();
    assert!(sent.unwrap().success());
}

/// Waits until it is so.
#[track_caller]
#[allow(clippy::disallowed_methods, reason = "a test of real processes has real time")]
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = SystemTime::now() + DEADLINE;
    while !is_so() {
        assert!(SystemTime::now() < end, "not within {DEADLINE:?}: {what}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// The demo, its janitor, store, identity, control, three applications and three sidecars.
const PROCESSES: usize = 11;
const DEADLINE: Duration = Duration::from_secs(60);
