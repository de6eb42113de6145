//! Opening nodes: what images may name, what is inherited, limits.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use dolmen_graph::{
    AccessRule, ChildDef, ChildSpec, Class, Common, Cx, Description, Driver, DriverKind, Extent, Graph,
    GraphOwner, ImageOps, Implicit, ImplicitChild, Limits, MAX_CHAIN, Node, NodeChange, NodeOpener, Op,
    OpenCx, OpenPolicy, Opened, Opener, Parsed, Plan, Prepared, Registry, Request,
};
use dolmen_rt::{LocalFuture, Rt};
use dolmen_sim::stand_in::{FORMAT, RAW, StandIn};
use dolmen_sim::{Image, MemoryDisk, Sim};
use dolmen_types::{
    BlkEvent, ChildRole, Error, ErrorKind, NodeName, OptionSpec, OptionType, Options, Result, Span, Value,
};
use proptest::prelude::*;

thread_local! {
    /// The file system of a test: each test has its own thread.
    static FILES: RefCell<BTreeMap<String, String>> = const { RefCell::new(BTreeMap::new()) };
    /// What was opened, with which flags.
    static OPENED: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

fn write_file(name: &str, content: &str) {
    FILES.with_borrow_mut(|f| f.insert(name.into(), content.into()));
}

/// An image of the test's format: text lines in its first bytes.
fn image(backing: Option<(&str, Option<&str>)>) -> String {
    let mut text = "FMT\n".to_owned();
    if let Some((name, format)) = backing {
        text += &format!("backing {name}\n");
        text += &format.map_or(String::new(), |f| format!("format {f}\n"));
    }
    text
}

static FILE: DriverKind = DriverKind {
    path: Some(|_, _| 1),
    protocols: &["file"],
    from_name: Some(|_, name| Ok(Options::new().with("driver", "file").with("filename", name.rest))),
    ..DriverKind::new(
        "file",
        Class::Protocol,
        "a file of the test",
        &[OptionSpec::required("filename", OptionType::Str, "name")],
        parse_file,
    )
};

fn parse_file(options: &mut Options, _: &Common) -> Result<Parsed> {
    let filename = options.require_str("filename")?;
    let beneath = options.take_str("x-beneath")?;
    let open = Box::new(OpenFile { filename, beneath });
    Ok(Parsed { children: Vec::new(), rule: AccessRule::LEAF, relies_down_to: None, open })
}

struct OpenFile {
    filename: String,
    beneath: Option<String>,
}

fn flags(common: &Common) -> String {
    let f = common.flags;
    let words = [
        (f.read_only, "read-only"),
        (common.auto_read_only, "auto-read-only"),
        (f.direct, "direct"),
        (f.no_flush, "no-flush"),
        (f.force_share, "force-share"),
        (f.unmap, "unmap"),
    ];
    words.iter().filter(|w| w.0).map(|w| format!(" {}", w.1)).collect()
}

impl Opener for OpenFile {
    fn open<'a>(self: Box<Self>, cx: OpenCx<'a>) -> LocalFuture<'a, Result<Opened>> {
        Box::pin(async move {
            let content = FILES
                .with_borrow(|f| f.get(&self.filename).cloned())
                .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("no file '{}'", self.filename)))?;
            let beneath = self.beneath.map_or(String::new(), |b| format!(" beneath {b}"));
            OPENED.with_borrow_mut(|o| o.push(format!("{}{beneath}{}", self.filename, flags(cx.common))));
            let disk = MemoryDisk::new(Image::from_bytes(content.as_bytes()));
            Ok(Opened::of(Arc::new(File { filename: self.filename, disk })))
        })
    }
}

#[derive(Debug)]
struct File {
    filename: String,
    disk: MemoryDisk,
}

impl Driver for File {
    fn kind(&self) -> &'static DriverKind {
        &FILE
    }
    fn size(&self, node: &Node) -> u64 {
        self.disk.size(node)
    }
    fn limits(&self, node: &Node) -> Limits {
        self.disk.limits(node)
    }
    fn access_rule(&self) -> AccessRule {
        AccessRule::LEAF
    }
    fn plan(&self, node: &Node, request: Request, span: Span) -> Plan {
        self.disk.plan(node, request, span)
    }
    fn run<'a>(&'a self, cx: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>> {
        self.disk.run(cx, op)
    }
    fn status<'a>(&'a self, cx: Cx<'a>, span: Span) -> LocalFuture<'a, Result<Extent>> {
        self.disk.status(cx, span)
    }
    fn event(&self, node: &Node, event: BlkEvent) -> Result<()> {
        self.disk.event(node, event)
    }
    fn prepare<'a>(
        &'a self,
        cx: Cx<'a>,
        change: &'a NodeChange,
    ) -> LocalFuture<'a, Result<Box<dyn Prepared>>> {
        self.disk.prepare(cx, change)
    }
    fn close<'a>(&'a self, cx: Cx<'a>) -> LocalFuture<'a, Result<()>> {
        self.disk.close(cx)
    }
    fn image(&self) -> Option<&dyn ImageOps> {
        None
    }

    fn describe(&self, _: &Node) -> Description {
        Description { filename: Some(self.filename.clone()), ..Description::default() }
    }
}

static FMT: DriverKind = DriverKind {
    probe: Some(|header, _| if header.starts_with(b"FMT\n") { 100 } else { 0 }),
    ..DriverKind::new("fmt", Class::Format, "a format that names other files", &[], parse_fmt)
};

static RAW_ROW: DriverKind = DriverKind::new("raw", Class::Format, "everything", &[], parse_raw);

fn parse_fmt(options: &mut Options, _: &Common) -> Result<Parsed> {
    let file = ChildSpec { name: "file", role: ChildRole::Metadata, def: ChildDef::take(options, "file")? };
    let def = match options.take("backing") {
        Some(v) => ChildDef::from_value("backing", v, true)?,
        None => ChildDef::FromImage,
    };
    let backing = ChildSpec { name: "backing", role: ChildRole::Backing, def };
    Ok(Parsed {
        children: vec![file, backing],
        rule: AccessRule::FORMAT,
        relies_down_to: None,
        open: Box::new(OpenFmt),
    })
}

fn parse_raw(options: &mut Options, _: &Common) -> Result<Parsed> {
    options.take_bool("x-probed")?;
    let file = ChildSpec { name: "file", role: ChildRole::Filtered, def: ChildDef::take(options, "file")? };
    Ok(Parsed {
        children: vec![file],
        rule: AccessRule::FILTER,
        relies_down_to: None,
        open: Box::new(OpenRaw),
    })
}

struct OpenRaw;

impl Opener for OpenRaw {
    fn open<'a>(self: Box<Self>, _: OpenCx<'a>) -> LocalFuture<'a, Result<Opened>> {
        let driver = Arc::new(StandIn::new(&RAW, AccessRule::FILTER));
        Box::pin(async move { Ok(Opened::of(driver)) })
    }
}

struct OpenFmt;

impl Opener for OpenFmt {
    fn open<'a>(self: Box<Self>, cx: OpenCx<'a>) -> LocalFuture<'a, Result<Opened>> {
        Box::pin(async move {
            let io = cx.read("file")?;
            let mut header = vec![0; io.size() as usize];
            io.read_bytes(0, &mut header).await?;
            let text = String::from_utf8_lossy(&header).into_owned();
            let word = |key: &str| text.lines().find_map(|l| l.strip_prefix(key)).map(str::to_owned);
            let mut implicit = Vec::new();
            if let Some(filename) = word("backing ") {
                let format = word("format ");
                implicit.push(ImplicitChild { child: "backing", role: ChildRole::Backing, filename, format });
            }
            if let Some(filename) = word("data ") {
                let format = Some("raw".into());
                implicit.push(ImplicitChild { child: "data-file", role: ChildRole::Data, filename, format });
            }
            OPENED.with_borrow_mut(|o| o.push(format!("fmt{}", flags(cx.common))));
            let driver = Arc::new(StandIn::new(&FORMAT, AccessRule::FORMAT));
            Ok(Opened { implicit, ..Opened::of(driver) })
        })
    }
}

/// Another way to read a file.
static OTHER: DriverKind = DriverKind::new("other", Class::Protocol, "another protocol", &[], parse_file);

static ROWS: [&DriverKind; 4] = [&FILE, &FMT, &RAW_ROW, &OTHER];
static REGISTRY: Registry = Registry::new(&ROWS);

const fn policy(implicit: Implicit, probe: bool) -> OpenPolicy {
    OpenPolicy { implicit, probe, permit_with: "--permit", probe_with: "--probe" }
}

fn file(name: &str) -> Options {
    Options::new().with("driver", "file").with("filename", name)
}

fn fmt(name: &str) -> Options {
    Options::new().with("driver", "fmt").with("file", file(name).into_value())
}

/// Opens a node named `n` under this policy; the names of all nodes, or the error.
/// The draft is dropped or published.
fn open(policy: OpenPolicy, options: Options) -> Result<Vec<String>> {
    OPENED.with_borrow_mut(Vec::clear);
    Sim::run(1, move |rt| async move {
        let mut owner = GraphOwner::new(rt.clone());
        let opener = NodeOpener { registry: REGISTRY, policy, names: Registry::protocol_name, rt: &rt };
        let mut draft = owner.draft();
        let name = opener.open(&mut draft, options.with("node-name", "n"), true).await?;
        assert_eq!(name.as_str(), "n");
        owner.commit(draft).await?;
        let chain =
            |n: &Node| n.children.iter().map(|c| format!("{}:{}", n.name, c.name)).collect::<Vec<_>>();
        Ok(owner.graph().nodes().iter().flat_map(|n| chain(n)).collect())
    })
}

fn opened() -> Vec<String> {
    OPENED.with_borrow(Vec::clone)
}

/// Opens `/d/top` with this content; the error.
#[track_caller]
fn refused(policy: OpenPolicy, content: &str) -> Error {
    write_file("/d/top", content);
    let e = open(policy, fmt("/d/top")).expect_err("must be refused");
    assert_eq!(opened(), ["/d/top unmap", "fmt"], "nothing that the image names was opened");
    e
}

#[test]
fn nothing_named_in_an_image_is_opened_when_denied() {
    write_file("/d/base", "data");
    let content = image(Some(("base", Some("raw"))));
    let e = refused(policy(Implicit::Deny, false), &content);
    assert_eq!(e.kind(), ErrorKind::PermissionDenied);
    assert_eq!(
        e.to_string(),
        "image '/d/top' names the backing file 'base', and files named inside images are not opened"
    );
    assert_eq!(e.remedy_text(), Some("if you trust the image: --permit"));
    // What the caller says itself counts, and `null` means none.
    let options = fmt("/d/top").with("backing", file("/d/base").into_value());
    open(policy(Implicit::Deny, false), options).unwrap();
    open(policy(Implicit::Deny, false), fmt("/d/top").with("backing", Value::Null)).unwrap();
}

#[test]
fn plain_names_beneath_the_directory_are_opened() {
    write_file("/d/base", "data");
    write_file("/d/sub/mid", &image(Some(("x/../../base", Some("raw")))));
    write_file("/d/top", &image(Some(("sub/mid", Some("fmt")))));
    let e = open(policy(Implicit::Beneath, false), fmt("/d/top")).unwrap_err();
    assert!(e.to_string().contains("names the backing file 'x/../../base'"), "{e}");
    assert!(e.to_string().starts_with("Could not open backing file 'sub/mid' of '/d/top': "), "{e}");
    write_file("/d/sub/mid", &image(Some(("base", Some("raw")))));
    write_file("/d/sub/base", "data");
    // The name is relative to the image that has it; the leaf is told to stay beneath.
    let nodes = open(policy(Implicit::Beneath, false), fmt("/d/top")).unwrap();
    assert_eq!(nodes.len(), 5, "{nodes:?}");
    assert_eq!(
        opened(),
        [
            "/d/top unmap",
            "fmt",
            "/d/sub/mid beneath /d read-only unmap",
            "fmt read-only",
            "/d/sub/base beneath /d/sub read-only",
        ]
    );
}

#[test]
fn other_names_are_refused_beneath() {
    for (name, why) in [
        ("/etc/passwd", "by an absolute name"),
        ("../secret", "not beneath"),
        ("a/../../b", "not beneath"),
        ("json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}", "not a plain file name"),
        ("nbd://host/x", "not a plain file name"),
        ("file:/etc/passwd", "not a plain file name"),
        ("anything:else", "not a plain file name"),
    ] {
        for format in ["raw", "fmt"] {
            let e = refused(policy(Implicit::Beneath, true), &image(Some((name, Some(format)))));
            assert_eq!(e.kind(), ErrorKind::PermissionDenied, "{name}");
            assert!(e.to_string().contains(why), "{name}: {e}");
            assert_eq!(e.remedy_text(), Some("if you trust the image: --permit"));
        }
    }
    let e = refused(policy(Implicit::Beneath, true), "FMT\ndata disk\n");
    assert!(e.to_string().ends_with("'disk', and external data files are not opened"), "{e}");
}

#[test]
fn an_image_that_is_no_file_of_this_host_has_no_directory() {
    for name in ["nbd://host/top", "http://host/top"] {
        write_file(name, &image(Some(("base", Some("raw")))));
        write_file("base", "must not be opened");
        let e = open(policy(Implicit::Beneath, true), fmt(name)).unwrap_err();
        assert!(e.to_string().contains("'base', but is not a file of this host itself"), "{e}");
    }
    // Permitted, the name means the same server, which this registry has no driver for.
    let e = open(policy(Implicit::Anything, true), fmt("nbd://host/top")).unwrap_err();
    assert!(e.to_string().contains("Unknown protocol 'nbd'"), "{e}");
}

#[test]
fn formats_are_not_guessed_unless_asked() {
    write_file("/d/base", &image(None));
    let e = refused(policy(Implicit::Beneath, false), &image(Some(("base", None))));
    assert_eq!(e.kind(), ErrorKind::PermissionDenied);
    assert!(e.to_string().contains("does not say which format its backing file '/d/base' has"), "{e}");
    assert!(e.remedy_text().unwrap().contains("rebase -u -b 'base' -F FORMAT '/d/top'"), "{e:?}");
    assert!(e.remedy_text().unwrap().ends_with("--probe"), "{e:?}");
    open(policy(Implicit::Beneath, true), fmt("/d/top")).unwrap();
    assert_eq!(opened().last().unwrap(), "fmt read-only", "guessed from the content");
    // A format that is a protocol would read the file through any driver.
    let e = refused(policy(Implicit::Anything, true), &image(Some(("base", Some("other")))));
    assert!(e.to_string().ends_with("as 'other', which is not an image format"), "{e}");
    // That of the file itself says that it has no format.
    write_file("/d/top", &image(Some(("base", Some("file")))));
    open(policy(Implicit::Anything, true), fmt("/d/top")).unwrap();
    // The same for the caller's own node.
    let guess = |probe| {
        open(policy(Implicit::Deny, probe), Options::new().with("file", file("/d/base").into_value()))
    };
    let e = guess(false).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::PermissionDenied);
    assert!(e.remedy_text().unwrap().contains("--probe"));
    assert_eq!(guess(true).unwrap(), ["n:file"]);
    let e = open(policy(Implicit::Deny, true), Options::new()).unwrap_err();
    assert_eq!(e.to_string(), "Parameter 'driver' is missing");
}

#[test]
fn anything_is_opened_when_permitted() {
    write_file("/elsewhere/base", "data");
    write_file("/d/top", &image(Some(("/elsewhere/base", Some("raw")))));
    open(policy(Implicit::Anything, false), fmt("/d/top")).unwrap();
    write_file("/d/top", &image(Some(("file:/elsewhere/base", Some("raw")))));
    open(policy(Implicit::Anything, false), fmt("/d/top")).unwrap();
    write_file("/d/top", &image(Some(("unheard:of", Some("raw")))));
    let e = open(policy(Implicit::Anything, false), fmt("/d/top")).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unsupported);
}

#[test]
fn a_chain_has_an_end() {
    // An image that is its own backing file.
    write_file("/d/loop", &image(Some(("loop", Some("fmt")))));
    let e = open(policy(Implicit::Beneath, false), fmt("/d/loop")).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Limit);
    assert!(e.to_string().ends_with(&format!("the chain has more than {MAX_CHAIN} images")));
    assert!(opened().len() <= 2 * (MAX_CHAIN + 1));
    // One that is just short enough opens.
    for i in 0..MAX_CHAIN {
        write_file(&format!("/d/{i}"), &image(Some((&format!("{}", i + 1), Some("fmt")))));
    }
    write_file(&format!("/d/{MAX_CHAIN}"), &image(None));
    open(policy(Implicit::Beneath, false), fmt("/d/0")).unwrap();
}

#[test]
fn flags_are_inherited() {
    write_file("/d/base", "data");
    write_file("/d/top", &image(Some(("base", Some("raw")))));
    let with = |name: &str, value: Value| {
        open(policy(Implicit::Beneath, false), fmt("/d/top").with(name, value)).unwrap();
        opened()
    };
    let cache = |name| Options::new().with(name, true).into_value();
    assert_eq!(
        with("cache", cache("direct")),
        ["/d/top direct unmap", "fmt direct", "/d/base beneath /d read-only direct"]
    );
    assert_eq!(
        with("cache", cache("no-flush")),
        ["/d/top no-flush unmap", "fmt no-flush", "/d/base beneath /d read-only no-flush"]
    );
    assert_eq!(
        with("read-only", true.into()),
        ["/d/top read-only unmap", "fmt read-only", "/d/base beneath /d read-only"]
    );
    assert_eq!(
        with("discard", "unmap".into()),
        ["/d/top unmap", "fmt unmap", "/d/base beneath /d read-only unmap"]
    );
    let shared = fmt("/d/top").with("read-only", true).with("force-share", true);
    open(policy(Implicit::Beneath, false), shared).unwrap();
    assert_eq!(
        opened(),
        [
            "/d/top read-only force-share unmap",
            "fmt read-only force-share",
            "/d/base beneath /d read-only force-share"
        ]
    );
    // What is said wins.
    let said = Options::new().with("driver", "fmt").with("read-only", true);
    let said =
        said.with("file", file("/d/top").with("read-only", false).with("discard", "ignore").into_value());
    open(policy(Implicit::Beneath, false), said).unwrap();
    assert_eq!(opened()[0], "/d/top");
}

#[test]
fn wrong_options_are_refused_by_name() {
    write_file("/d/top", &image(None));
    let text = |options| open(policy(Implicit::Deny, false), options).unwrap_err().to_string();
    assert_eq!(text(fmt("/d/top").with("colour", "red")), "driver 'fmt' has no option 'colour'");
    assert_eq!(text(Options::new().with("driver", "nope")), "Unknown driver 'nope'");
    assert_eq!(text(Options::new().with("driver", "fmt")), "Parameter 'file' is missing");
    assert_eq!(text(fmt("/d/none")), "no file '/d/none'");
    assert!(text(Options::new().with("driver", "fmt").with("file", "nobody")).contains("'nobody'"));
    assert!(text(fmt("/d/top").with("force-share", true)).contains("read-only"));
    assert!(text(fmt("/d/top").with("detect-zeroes", "unmap")).contains("discard"));
}

#[test]
fn a_node_named_twice_is_refused() {
    write_file("/d/top", &image(None));
    Sim::run(1, |rt| async move {
        let owner = GraphOwner::new(rt.clone());
        let opener = NodeOpener {
            registry: REGISTRY,
            policy: policy(Implicit::Deny, false),
            names: Registry::protocol_name,
            rt: &rt,
        };
        let mut draft = owner.draft();
        opener.open(&mut draft, fmt("/d/top").with("node-name", "n"), true).await.unwrap();
        let e = opener.open(&mut draft, fmt("/d/top").with("node-name", "n"), true).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::AlreadyExists);
        let bad = fmt("/d/top").with("node-name", "#block000");
        assert_eq!(opener.open(&mut draft, bad, true).await.unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(draft.node_names().filter(|n| **n == NodeName::internal("n")).count(), 1);
    });
}

/// How a node of a random graph is defined: with children inside it, or by name.
#[derive(Clone, Debug)]
enum Shape {
    Image { backing: Option<Box<Shape>>, named: bool },
    Filter { below: Box<Shape>, named: bool },
}

fn shapes() -> impl Strategy<Value = Shape> {
    let image = any::<bool>().prop_map(|named| Shape::Image { backing: None, named });
    image.prop_recursive(5, 12, 1, |inner| {
        let with = (inner, any::<bool>(), any::<bool>());
        with.prop_map(|(below, named, filter)| {
            let below = Box::new(below);
            if filter { Shape::Filter { below, named } } else { Shape::Image { backing: Some(below), named } }
        })
    })
}

impl Shape {
    /// The options that define it; what is named gets a name that nobody has yet.
    fn options(&self, next: &mut u32) -> Options {
        *next += 1;
        let (mut o, named) = match self {
            Shape::Image { backing, named } => {
                let backing = backing.as_ref().map_or(Value::Null, |b| b.options(next).into_value());
                (fmt("/d/image").with("backing", backing), named)
            }
            Shape::Filter { below, named } => {
                (Options::new().with("driver", "raw").with("file", below.options(next).into_value()), named)
            }
        };
        if *named {
            o.set("node-name", format!("n{next}"));
            *next += 1;
        }
        o
    }
}

/// The links of all nodes.
fn links(graph: &Graph) -> BTreeMap<String, Vec<(&'static str, String)>> {
    let of = |n: &Node| n.children.iter().map(|c| (c.name, c.node.name.to_string())).collect();
    graph.nodes().iter().map(|n| (n.name.to_string(), of(n))).collect()
}

/// Some chains, defined in any way and then stacked as snapshots do it; then every node in turn is reopened with
/// the children that it has.
async fn stack_and_reopen(rt: &Rt, chains: Vec<Shape>, order: Vec<(usize, bool, bool)>) -> Result<()> {
    let mut owner = GraphOwner::new(rt.clone());
    let policy = policy(Implicit::Deny, false);
    let opener = NodeOpener { registry: REGISTRY, policy, names: Registry::protocol_name, rt };
    let mut draft = owner.draft();
    let mut next = 0;
    let mut below: Option<NodeName> = None;
    for shape in chains {
        // The top of each chain is an image that nothing lies under yet.
        let file = file("/d/image").into_value();
        let top = Options::new().with("driver", "fmt").with("file", file).with("backing", Value::Null);
        let top = opener.open(&mut draft, top, false).await?;
        let low = opener.open(&mut draft, shape.options(&mut next), false).await?;
        draft.set_backing_link(&top, Some(low.as_str()))?;
        if let Some(below) = below {
            let mut lowest = draft.images(&low).pop().expect("a chain ends in an image");
            lowest = draft.content(&lowest);
            draft.set_backing_link(&lowest, Some(below.as_str()))?;
        }
        below = Some(top);
    }
    owner.commit(draft).await?;

    for (which, read_only, direct) in order {
        let graph = owner.graph().clone();
        let node = &graph.nodes()[which % graph.len()];
        if node.children.is_empty() {
            continue;
        }
        let cache = Options::new().with("direct", direct).into_value();
        let mut o =
            Options::new().with("driver", node.driver.kind().name).with("node-name", node.name.as_str());
        o = o.with("read-only", read_only).with("cache", cache);
        if node.driver.kind().name == "qcow2" {
            o = o.with("driver", "fmt").with("backing", Value::Null);
        }
        for c in &node.children {
            o.set(c.name, c.node.name.as_str());
        }
        let before = links(&graph);
        let mut draft = owner.draft();
        let op = draft.add_command("reopen", String::new());
        opener.reopen(&mut draft, &op, vec![o]).await?;
        draft.remove_op(&op);
        owner.commit(draft).await?;
        assert_eq!(links(&owner.graph()), before, "after '{}' was reopened", node.name);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// A snapshot had linked the backing file of an image that was defined with `backing: null`. When the image above
    /// was reopened with other flags, it followed - and was linked as it had been defined, to nothing: the guest read
    /// zeroes, and copied them up for good.
    #[test]
    fn a_node_that_a_reopen_does_not_name_keeps_its_links(
        chains in prop::collection::vec(shapes(), 1..4),
        order in prop::collection::vec((0..64usize, any::<bool>(), any::<bool>()), 1..8),
    ) {
        write_file("/d/image", &image(None));
        Sim::run(1, |rt| async move { stack_and_reopen(&rt, chains, order).await }).unwrap();
    }
}
