//! A folder of manifests, as a person edits it, and what the mesh sees of it.

#![allow(clippy::unwrap_used)] // A test may fail by panicking.

mod support;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;

use serde_json::Value;
use steadfast_platform::Store as _;
use steadfast_platform::standalone::{Client, Directory, Tokens};
use steadfast_platform::token::{IDENTITY_AUDIENCE, TokenRefusal, TokenReview as _};
use steadfast_process::SystemClock;
use support::process::{StoreProcess, eventually, resource, serving};

const ACCOUNT: &str =
    "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: web, namespace: demo}\n---\n";
const POD: &str = "apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: demo, labels: {app: web}}
spec: {serviceAccountName: web}
status: {podIP: 127.0.0.1}
";
const SERVICE: &str = "apiVersion: v1
kind: Service
metadata: {name: web, namespace: demo}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
";

struct Mesh {
    _dir: tempfile::TempDir,
    directory: Directory,
    client: Client,
    store: StoreProcess,
}

impl Mesh {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::new(dir.path().join("mesh"));
        directory.create().unwrap();
        let store = StoreProcess::start(&directory);
        let client = Client::new(&directory);
        serving(&client).await;
        Self { _dir: dir, directory, client, store }
    }

    fn write(&self, file: &str, text: &str) {
        std::fs::write(self.directory.manifests().join(file), text).unwrap();
    }

    async fn wait_for(&self, key: &str) -> Value {
        eventually(key, async || resource(&self.client, key).await).await
    }

    async fn wait_for_uid(&self, key: &str, good: impl Fn(Option<String>) -> bool) {
        eventually(key, async || {
            let found = resource(&self.client, key).await;
            let uid = found.map(|value| value["metadata"]["uid"].as_str().unwrap().to_owned());
            good(uid).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn the_mesh_follows_what_is_written_changed_broken_mended_and_deleted() {
    let mut mesh = Mesh::start().await;
    mesh.write("pods.yaml", &format!("{ACCOUNT}{POD}"));
    let pod = mesh.wait_for("Pod/demo/web-1").await;
    mesh.write("service.yaml", SERVICE);
    mesh.wait_for("Service/demo/web").await;

    // Broken: the last good version stays, also over a restart, while others still change.
    mesh.write("pods.yaml", &format!("{ACCOUNT}{}", POD.replace("podIP: ", "podIP: [")));
    mesh.write("service.yaml", &SERVICE.replace("8080", "9090"));
    let changed = async |port: i64| {
        let service = resource(&mesh.client, "Service/demo/web").await?;
        (service["spec"]["ports"][0]["targetPort"] == port).then_some(())
    };
    eventually("the service changes", async || changed(9090).await).await;
    assert_eq!(resource(&mesh.client, "Pod/demo/web-1").await.unwrap(), pod);
    mesh.store.kill();
    mesh.store = StoreProcess::start(&mesh.directory);
    serving(&mesh.client).await;
    mesh.write("service.yaml", &SERVICE.replace("8080", "7070"));
    let changed = async |port: i64| {
        let service = resource(&mesh.client, "Service/demo/web").await?;
        (service["spec"]["ports"][0]["targetPort"] == port).then_some(())
    };
    eventually("the service changes again", async || changed(7070).await).await;
    assert_eq!(resource(&mesh.client, "Pod/demo/web-1").await.unwrap(), pod);

    // Mended by renaming over, as editors do.
    let path = mesh.directory.manifests().join("pods.yaml");
    let mended = POD.replace("labels: {app: web}", "labels: {app: web, v: '2'}");
    std::fs::write(path.with_extension("tmp"), format!("{ACCOUNT}{mended}")).unwrap();
    std::fs::rename(path.with_extension("tmp"), &path).unwrap();
    eventually("the pod changes", async || {
        let pod = resource(&mesh.client, "Pod/demo/web-1").await?;
        (pod["metadata"]["labels"]["v"] == "2").then_some(())
    })
    .await;
    let uid = pod["metadata"]["uid"].as_str().unwrap().to_owned();
    mesh.wait_for_uid("Pod/demo/web-1", |found| found.as_deref() == Some(&uid)).await;

    // Deleted and made again: another pod.
    std::fs::remove_file(&path).unwrap();
    mesh.wait_for_uid("Pod/demo/web-1", |found| found.is_none()).await;
    mesh.write("pods.yaml", &format!("{ACCOUNT}{POD}"));
    mesh.wait_for_uid("Pod/demo/web-1", |found| found.is_some_and(|found| found != uid)).await;
}

#[tokio::test]
async fn services_get_the_endpoints_of_their_pods() {
    let mesh = Mesh::start().await;
    mesh.write("all.yaml", &format!("{ACCOUNT}{POD}---\n{SERVICE}"));
    let pod = mesh.wait_for("Pod/demo/web-1").await;
    mesh.wait_for("ServiceAccount/demo/web").await;
    let slice = eventually("the endpoints are there", async || {
        let (entries, _) = mesh.client.list("resources/EndpointSlice/demo/").await.ok()?;
        serde_json::from_slice::<Value>(&entries.first()?.value).ok()
    })
    .await;
    assert_eq!(slice["endpoints"][0]["targetRef"]["uid"], pod["metadata"]["uid"]);
    assert_eq!(slice["ports"][0]["port"], 8080);
}

#[tokio::test]
async fn a_broken_manifest_is_told_with_file_line_and_column_in_the_log_and_in_the_report() {
    let dir = tempfile::tempdir().unwrap();
    let (directory, log) = (Directory::new(dir.path().join("mesh")), dir.path().join("log"));
    directory.create().unwrap();
    let broken = format!("{ACCOUNT}{}", POD.replace("spec: {serviceAccountName: web}", "spec: 7"));
    std::fs::write(directory.manifests().join("pods.yaml"), broken).unwrap();
    let admin = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let file = std::fs::File::create(&log).unwrap();
    let _store = StoreProcess::start_watched(&directory, admin, file);

    let report = eventually("the report names the file", async || {
        let report = get(admin, "/manifests.json")?;
        report.as_array()?.iter().find(|file| file["file"] == "pods.yaml").cloned()
    })
    .await;
    assert_eq!((&report["ok"], &report["objects"]), (&false.into(), &0.into()), "{report}");
    let problem = &report["problem"];
    assert_eq!((&problem["line"], &problem["column"]), (&8.into(), &7.into()), "{report}");
    let reason = problem["reason"].as_str().unwrap();
    assert!(reason.starts_with("spec: "), "{report}");
    let line = eventually("the log names the file", async || {
        let log = std::fs::read_to_string(&log).unwrap();
        log.lines()
            .find(|line| line.contains("SFT-") && line.contains("pods.yaml"))
            .map(str::to_owned)
    })
    .await;
    for part in ["file=\"pods.yaml\"", "line=8", "column=7", reason] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
}

/// What the admin port answers, if it is JSON.
fn get(admin: SocketAddr, path: &str) -> Option<Value> {
    let mut stream = TcpStream::connect(admin).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()
}

#[tokio::test]
async fn a_pod_gets_a_token_that_is_good_until_the_pod_is_gone() {
    let mesh = Mesh::start().await;
    let store = Arc::new(mesh.client.clone());
    let (tokens, follow) = Tokens::new(store, Arc::new(SystemClock));
    let test = async {
        mesh.write("pods.yaml", &format!("{ACCOUNT}{POD}"));
        let path = mesh.directory.pod("demo", "web-1").unwrap().token();
        let token = eventually("a token", async || std::fs::read(&path).ok()).await;
        let reviewed = tokens.review(&token, IDENTITY_AUDIENCE).await.unwrap();
        assert_eq!(
            (reviewed.namespace.as_str(), reviewed.service_account.as_str()),
            ("demo", "web")
        );
        std::fs::remove_file(mesh.directory.manifests().join("pods.yaml")).unwrap();
        let refusal = eventually("the token is refused", async || {
            tokens.review(&token, IDENTITY_AUDIENCE).await.err()
        })
        .await;
        assert!(matches!(refusal, TokenRefusal::WorkloadGone(_)), "{refusal}");
        eventually("the token is gone", async || (!path.exists()).then_some(())).await;
    };
    tokio::select! {
        _ = follow => panic!("following ended"),
        () = test => {}
    }
}
