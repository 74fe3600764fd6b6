//! Promise: a person orders, follows, pauses, undoes and helps rotations by commands that say what
//! they will do, what they wait for, and whom they miss.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use steadfast_test_rig::process::binary_path;
use steadfast_test_rig::{Mesh, MeshConfig, PodSpec, until};

use crate::restored::{copy, store_file};

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
        let words = ["paused by a person", "exempt: demo/web-0 (frozen by a test"];
        let said = words.iter().all(|words| status.stdout.contains(words));
        if said && status.code == Some(1) { Ok(()) } else { Err(status.text()) }
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

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_replica_of_identity_is_exempted_by_its_name_and_orders_are_done_without_it() {
    let config = MeshConfig { second_identity: true, ..MeshConfig::rotating() };
    let mut mesh = Mesh::start(config).await;
    mesh.identity_2.as_mut().unwrap().kill();
    let web = mesh.pod(PodSpec::new("web", &[]));
    web.ready().await;

    // It is the only one that a plan misses; another name is answered with who is missing.
    let dead = until("the dead replica is missed", PATIENCE, || async {
        let planned = steadfast(&mesh, &["anchor", "rotate", "--dry-run", "-o", "json"]).await;
        let missing = planned.json()["missing"].as_array().unwrap().clone();
        match missing.as_slice() {
            [one] if one["name"].to_string().contains("identity ") => {
                Ok(one["name"].as_str().unwrap().to_owned())
            }
            _ => Err(planned.text()),
        }
    })
    .await;
    let exempt = |name| ["anchor", "exempt", name, "--reason", "it is dead", "--yes"];
    let refused = steadfast(&mesh, &exempt("identity 192.0.2.1:8080")).await;
    assert_eq!(refused.code, Some(1), "{}", refused.text());
    assert!(refused.stderr.contains(&format!("{dead:?}")), "{}", refused.text());
    let refused = steadfast(&mesh, &["anchor", "unexempt", &dead]).await;
    assert!(refused.stderr.contains("is not exempt; nobody is"), "{}", refused.text());
    well(&mesh, &exempt(&dead)).await;
    well(&mesh, &["anchor", "unexempt", &dead]).await;
    well(&mesh, &exempt(&dead)).await;
    let status = steadfast(&mesh, &["anchor", "status"]).await;
    assert!(status.stdout.contains(&format!("exempt: {dead} (")), "{}", status.text());

    // Another standby, followed by a program: each line says what has changed.
    let standby = standby(&mesh).await;
    well(&mesh, &["anchor", "withdraw", &standby[..8], "--yes", "--no-wait", "--by", "ann"]).await;
    let watched = well(&mesh, &["anchor", "status", "--watch", "-o", "json"]).await;
    let lines: Vec<Value> =
        watched.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let phases = ["generating", "staged", "withdrawn"];
    let seen = |phase| lines.iter().any(|line| line["rotation"]["phase"] == phase);
    assert!(phases.iter().all(|phase| seen(*phase)), "{}", watched.text());
    let last = &lines.last().unwrap()["last"];
    let told = [&last["kind"], &last["by"], &last["outcome"]].map(|word| word.as_str().unwrap());
    assert_eq!(told, ["standby", "ann", "done"], "{}", watched.text());
    let fresh = self::standby(&mesh).await;
    assert_ne!(fresh, standby);
    let refused = steadfast(&mesh, &["anchor", "unexempt", &dead]).await;
    assert_eq!(refused.code, Some(1), "{}", refused.text());
    assert!(refused.stderr.contains("has gone on without"), "{}", refused.text());

    // An issuer is loaded by the replicas that are there, also when its key is stolen.
    let planned = ["issuer", "rotate", "--yes", "-o", "json"];
    let urgent = ["issuer", "rotate", "--emergency", "--yes", "-o", "json"];
    for (order, denied) in [(&planned[..], false), (&urgent[..], true)] {
        let rotated = well(&mesh, order).await.json();
        assert_ne!(rotated["from"], rotated["to"], "{rotated}");
        let state = mesh.trust_domain().await.0;
        assert_eq!(rotated["to"], state.active_issuer.to_string());
        let from = rotated["from"].as_str().unwrap().parse().unwrap();
        assert_eq!(state.denies(from), denied, "{rotated}");
    }

    // The standby's key is stolen: it goes at once, and another one comes.
    let stolen = fresh;
    let tainted = well(&mesh, &["anchor", "taint", &stolen, "--yes", "-o", "json"]).await.json();
    let removed = &tainted["rotations"][0];
    assert_eq!(removed["kind"], "removal", "{tainted}");
    assert_eq!(removed["number"], tainted["ordered"], "{tainted}");
    assert_ne!(self::standby(&mesh).await, stolen);
    let again = steadfast(&mesh, &["anchor", "taint", &stolen, "--yes"]).await;
    assert!(again.stderr.contains("no anchor begins with"), "{}", again.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_display_outlives_a_restart_of_the_store_and_says_that_all_is_halted() {
    let mut mesh = Mesh::start(MeshConfig::rotating()).await;
    let web = mesh.pod(PodSpec::new("web", &[]));
    web.ready().await;
    let before = copy(&mesh, "before");

    // The store is away for a moment: that is told once, and the display goes on to the end.
    let mut shown = Shown::of(&mesh, "rotate.txt", &["anchor", "rotate", "--yes"]);
    mesh.state_where("it is under way", PATIENCE, |state| state.rotation.is_some()).await;
    mesh.store.kill();
    shown.says("no store answers").await;
    mesh.store.restart();
    assert_eq!(shown.ends().await, Some(0), "{}", shown.text());
    let text = shown.text();
    assert_eq!(text.matches("no store answers").count(), 1, "{text}");
    assert!(text.contains("rotation 1 (anchor) is done"), "{text}");
    // It has closed connections, and nobody is taken for one that is away because of that.
    let planned = steadfast(&mesh, &["anchor", "rotate", "--dry-run"]).await;
    assert!(!planned.stdout.contains("has never connected"), "{}", planned.text());

    // In a store that was put back nothing moves, and an emergency says what must come first.
    mesh.store.kill();
    std::fs::copy(before, store_file(&mesh)).unwrap();
    mesh.store.restart();
    mesh.state_where("it is found out", PATIENCE, |state| state.halted.is_some()).await;
    let emergency = ["anchor", "rotate", "--emergency", "--yes"];
    let mut shown = Shown::of(&mesh, "emergency.txt", &emergency);
    shown.says("! the store was restored from a backup").await;
    assert!(shown.text().contains("steadfast trust recover"), "{}", shown.text());
    signal(shown.command.id(), "INT");
    assert_eq!(shown.ends().await, Some(130), "{}", shown.text());
}

/// A command that shows something until it ends.
struct Shown {
    command: Child,
    file: PathBuf,
}

impl Shown {
    fn of(mesh: &Mesh, file: &str, args: &[&str]) -> Self {
        let file = mesh.dir().join(file);
        let out = || std::fs::File::options().append(true).create(true).open(&file).unwrap();
        let command = command(mesh, args).stdout(out()).stderr(out()).spawn().unwrap();
        Self { command, file }
    }

    fn text(&self) -> String {
        std::fs::read_to_string(&self.file).unwrap()
    }

    async fn says(&self, words: &str) {
        until(&format!("it says {words:?}"), PATIENCE, || async {
            let text = self.text();
            if text.contains(words) { Ok(()) } else { Err(text) }
        })
        .await;
    }

    async fn ends(&mut self) -> Option<i32> {
        let ended = until("the display ends", PATIENCE, || {
            let ended = self.command.try_wait().unwrap();
            async move { ended.ok_or_else(|| "it still runs".to_owned()) }
        })
        .await;
        ended.code()
    }
}

/// The id of the standby.
async fn standby(mesh: &Mesh) -> String {
    let anchors = well(mesh, &["anchor", "list", "-o", "json"]).await.json();
    let mut anchors = anchors.as_array().unwrap().iter();
    let standby = anchors.find(|anchor| anchor["state"] == "standby").expect("a standby");
    standby["id"].as_str().unwrap().to_owned()
}

/// A command that is to go well.
async fn well(mesh: &Mesh, args: &[&str]) -> Said {
    let said = steadfast(mesh, args).await;
    assert_eq!(said.code, Some(0), "{args:?}: {}", said.text());
    said
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
