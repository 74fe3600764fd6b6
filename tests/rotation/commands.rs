//! Promise: a person orders, follows, pauses, undoes and helps rotations by commands that say what
//! they will do, what they wait for, and whom they miss.

use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use steadfast_test_rig::process::binary_path;
use steadfast_test_rig::{Mesh, MeshConfig, PodSpec, until};

#[tokio::test(flavor = "multi_thread")]
async fn a_person_rotates_an_anchor_by_commands_and_learns_whom_it_waits_for() {
    let mesh = Mesh::start(MeshConfig::rotating()).await;
    let web = mesh.pod(PodSpec::new("web", &[]));
    web.ready().await;

    // Nothing is in the way, and everybody answers.
    let plan = until("a plan with nothing in the way", PATIENCE, || async {
        let planned = steadfast(&mesh, &["anchor", "rotate", "--dry-run", "-o", "json"]).await;
        if planned.code == Some(0) { Ok(planned.json()) } else { Err(planned.text()) }
    })
    .await;
    assert!(plan["asked"].as_u64() >= Some(3), "web, control, rotation: {plan}");
    assert_eq!(plan["missing"], Value::Array(Vec::new()), "{plan}");
    let refused = steadfast(&mesh, &["anchor", "rotate"]).await;
    assert_eq!(refused.code, Some(2), "nobody can be asked: {}", refused.text());
    assert!(refused.stderr.contains("--yes"), "{}", refused.text());

    // A frozen sidecar is named, by the plan and by the rotation.
    signal(web.proxy.pid(), "STOP");
    until("the plan names it", PATIENCE, || async {
        let planned = steadfast(&mesh, &["anchor", "rotate", "--dry-run", "-o", "json"]).await;
        let named = planned.json()["missing"][0]["name"] == "demo/web-0";
        if planned.code == Some(1) && named { Ok(()) } else { Err(planned.text()) }
    })
    .await;
    let ordered =
        steadfast(&mesh, &["anchor", "rotate", "--yes", "--no-wait", "--by", "ann"]).await;
    assert_eq!(ordered.code, Some(0), "{}", ordered.text());
    let twice = steadfast(&mesh, &["anchor", "rotate", "--yes", "--no-wait"]).await;
    assert_eq!(twice.code, Some(1), "one at a time: {}", twice.text());
    assert!(twice.stderr.contains("under way"), "{}", twice.text());

    // Exempted, it is waited for no more; the rotation begins, pauses, and goes on.
    let exempt = ["anchor", "exempt", "demo/web-0", "--reason", "frozen by a test", "--yes"];
    until("it can be exempted", PATIENCE, || async {
        let exempted = steadfast(&mesh, &exempt).await;
        if exempted.code == Some(0) { Ok(()) } else { Err(exempted.text()) }
    })
    .await;
    until("the rotation is under way", PATIENCE, || async {
        let status = steadfast(&mesh, &["anchor", "status", "-o", "json"]).await.json();
        if status["rotation"]["by"] == "ann" { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    let paused = steadfast(&mesh, &["anchor", "pause"]).await;
    assert!(paused.stdout.contains("anchor resume"), "{}", paused.text());
    until("it says that it is paused", PATIENCE, || async {
        let status = steadfast(&mesh, &["anchor", "status"]).await;
        let words = ["paused by a person", "exempt: pod", "frozen by a test"];
        let said = words.iter().all(|words| status.stdout.contains(words));
        if said { Ok(()) } else { Err(status.text()) }
    })
    .await;

    // Who follows it may leave: it goes on. Undone, it ends where it began.
    let before = mesh.trust_domain().await.0;
    let mut following =
        command(&mesh, &["anchor", "resume"]).stdout(Stdio::null()).spawn().unwrap();
    until("it goes on", PATIENCE, || async {
        let state = mesh.trust_domain().await.0;
        if state.paused { Err(format!("{:?}", state.rotation)) } else { Ok(()) }
    })
    .await;
    signal(following.id(), "INT");
    let left = until("the display ends", PATIENCE, || {
        let left = following.try_wait().unwrap();
        async move { left.ok_or_else(|| "still runs".to_owned()) }
    })
    .await;
    assert_eq!(left.code(), Some(130), "{left:?}");
    let aborted = steadfast(&mesh, &["anchor", "abort", "--yes", "-o", "json"]).await;
    assert_eq!(aborted.code, Some(0), "{}", aborted.text());
    assert_eq!(aborted.json()["rotations"][0]["outcome"], "aborted", "{}", aborted.text());
    let after = mesh.trust_domain().await.0;
    assert_eq!(after.active_anchor().map(|a| a.id), before.active_anchor().map(|a| a.id));

    // Thawed, it answers, and its exemption is over without anybody's help.
    signal(web.proxy.pid(), "CONT");
    until("the exemption is over", PATIENCE, || async {
        let exempt = mesh.trust_domain().await.0.exemptions;
        if exempt.is_empty() { Ok(()) } else { Err(format!("{exempt:?}")) }
    })
    .await;
    let history = steadfast(&mesh, &["trust", "history"]).await;
    assert!(
        history.stdout.contains("ann") && history.stdout.contains("undone"),
        "{}",
        history.text()
    );
}

/// What a command printed, and how it ended.
pub(crate) struct Said {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Said {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|_| panic!("no JSON: {}", self.text()))
    }

    pub(crate) fn text(&self) -> String {
        format!("exit {:?}\n{}{}", self.code, self.stdout, self.stderr)
    }
}

pub(crate) async fn steadfast(mesh: &Mesh, args: &[&str]) -> Said {
    let mut command = command(mesh, args);
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let (stdout, stderr) = (text(output.stdout), text(output.stderr));
    Said { code: output.status.code(), stdout, stderr }
}

fn command(mesh: &Mesh, args: &[&str]) -> Command {
    let mut command = Command::new(binary_path("steadfast"));
    command.args(args).arg("--dir").arg(mesh.dir()).stdin(Stdio::null());
    if matches!(args[0], "anchor" | "issuer") && !args.contains(&"list") {
        command.args(["--rotation-admin", &mesh.rotation_admin.to_string()]);
    }
    command
}

fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status();
    assert!(sent.unwrap().success(), "{pid} is gone");
}

const PATIENCE: Duration = Duration::from_secs(120);
