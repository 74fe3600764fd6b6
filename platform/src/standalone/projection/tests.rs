//! What is in the pods' directories after a round.

use std::os::unix::fs::PermissionsExt;

use super::super::issuer::tests::holder as test_holder;
use super::*;

struct Fixture {
    _dir: tempfile::TempDir,
    directory: Directory,
    issuer: Issuer,
    wanted: Wanted,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::new(dir.path().join("mesh"));
        directory.create().unwrap();
        let issuer = Issuer::open(&directory.token_key()).unwrap();
        let wanted = Wanted {
            holders: Arc::new(vec![test_holder()]),
            bundle: Some(b"bundle one"[..].into()),
            ..Wanted::default()
        };
        Self { _dir: dir, directory, issuer, wanted }
    }

    fn round(&self, secs: i64) -> Done {
        let ttl = Duration::from_secs(100);
        let done =
            project(&self.directory, &self.issuer, &self.wanted, ttl, UnixTime::from_secs(secs));
        assert!(done.failures.is_empty(), "{:?}", done.failures);
        done
    }

    fn pod(&self) -> PodDirectory {
        self.directory.pod("demo", "web-1").unwrap()
    }

    fn token(&self) -> String {
        std::fs::read_to_string(self.pod().token()).unwrap()
    }
}

#[test]
fn a_pod_has_a_private_token_and_bundle() {
    let fixture = Fixture::new();
    let done = fixture.round(1000);
    assert_eq!((done.renewed, done.next), (1, Some(UnixTime::from_secs(1080))));
    assert_eq!(std::fs::read(fixture.pod().bundle()).unwrap(), b"bundle one");
    let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o7777;
    assert_eq!(mode(&fixture.pod().token()), 0o600);
    assert_eq!(mode(&fixture.pod().bundle()), 0o600);
    assert_eq!(mode(fixture.pod().path()), 0o700);
    assert_eq!(std::fs::read_dir(fixture.pod().path()).unwrap().count(), 2);
}

#[test]
fn a_token_is_renewed_at_four_fifths_of_its_life_and_not_before() {
    let fixture = Fixture::new();
    fixture.round(1000);
    let first = fixture.token();
    let done = fixture.round(1079);
    assert_eq!((done.renewed, done.next), (0, Some(UnixTime::from_secs(1080))));
    assert_eq!(fixture.token(), first);
    assert_eq!(fixture.round(1080).renewed, 1);
    assert_ne!(fixture.token(), first);
}

#[test]
fn a_clock_that_was_set_back_renews_at_once() {
    let fixture = Fixture::new();
    fixture.round(1_000_000);
    assert_eq!(fixture.round(1000).renewed, 1);
}

#[test]
fn what_others_have_changed_is_put_right() {
    let fixture = Fixture::new();
    fixture.round(1000);
    let (token, bundle) = (fixture.pod().token(), fixture.pod().bundle());
    std::fs::write(&token, "forged").unwrap();
    std::fs::write(&bundle, "forged").unwrap();
    assert_eq!(fixture.round(1001).renewed, 1);
    assert_eq!(std::fs::read(&bundle).unwrap(), b"bundle one");
    std::fs::remove_dir_all(fixture.pod().path()).unwrap();
    assert_eq!(fixture.round(1002).renewed, 1);
    std::fs::set_permissions(&token, PermissionsExt::from_mode(0o644)).unwrap();
    assert_eq!(fixture.round(1003).renewed, 1);
    assert_eq!(std::fs::metadata(&token).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn a_pod_that_was_made_again_has_a_token_of_its_own() {
    let mut fixture = Fixture::new();
    fixture.round(1000);
    let again = Holder { pod_uid: "another".to_owned(), ..test_holder() };
    fixture.wanted.holders = Arc::new(vec![again]);
    assert_eq!(fixture.round(1001).renewed, 1);
}

#[test]
fn a_changed_bundle_is_mirrored_and_a_lost_one_is_kept() {
    let mut fixture = Fixture::new();
    fixture.round(1000);
    fixture.wanted.bundle = Some(b"bundle two"[..].into());
    assert_eq!(fixture.round(1001).renewed, 0);
    assert_eq!(std::fs::read(fixture.pod().bundle()).unwrap(), b"bundle two");
    fixture.wanted.bundle = None;
    fixture.round(1002);
    assert_eq!(std::fs::read(fixture.pod().bundle()).unwrap(), b"bundle two");
}

#[test]
fn with_its_pod_a_directory_goes() {
    let mut fixture = Fixture::new();
    fixture.round(1000);
    fixture.wanted.holders = Arc::default();
    fixture.wanted.without.insert(ObjectName::new("demo", "web-1"), "no account".to_owned());
    fixture.round(1001);
    assert!(fixture.pod().token().exists(), "a pod that is there keeps what it has");
    fixture.wanted.without.clear();
    fixture.round(1002);
    assert!(!fixture.pod().path().exists());
    assert_eq!(std::fs::read_dir(fixture.directory.pods()).unwrap().count(), 0);
}

#[test]
fn a_pod_whose_service_account_is_missing_is_told_so() {
    let pod: Pod = serde_json::from_value(serde_json::json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"uid": "u"},
        "spec": {"serviceAccountName": "web", "containers": []},
    }))
    .unwrap();
    let name = ObjectName::new("demo", "web-1");
    let why = holder(&name, pod.clone(), &BTreeMap::new()).unwrap_err();
    assert!(why.contains("demo/web"), "{why}");
    let uids = [("resources/ServiceAccount/demo/web".to_owned(), "s".to_owned())].into();
    assert_eq!(holder(&name, pod, &uids).unwrap().service_account_uid, "s");
}
