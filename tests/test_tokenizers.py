"""Tokenizers of directories: ids are those of tokenizer.json, whatever class is
named beside it; an export reads back the same ids."""

import json
import random
import shutil
from pathlib import Path

import pytest
from tokenizers import (
  AddedToken,
  Regex,
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

from jaxrl_tok import data
from jaxrl_tok.data.tokenizers import (
  added_ids,
  answer_ids,
  encode_texts,
  stop_ids,
)
from jaxrl_tok.hub.directory import open_model, save
from jaxrl_tok.hub.tokenizer import auto_difference, read_tokenizer
from jaxrl_tok.hub.weights import read_params

GOLDEN = Path(__file__).parent / 'golden/families'
SPECIAL = ['<pad>', '<s>', '</s>', '<unk>']
WORDS = """
47 12 2026 3.14 1,000 47-12= 4747 the The cat and café cafe\u0301 Ångström naïve
ﬁne STRASSE straße 你好 世界 日本語 한국어 Привет שלום मरहबा
😀 👩\u200d🔬 ❤\ufe0f x=1 f(x): return a!=b -> {} []
<b> </s> <s> <pad> don't I'll \\frac{1}{2} ▁ Ġ $x_{i}$ https://a.bc/d?e=f#g
"""
GAPS = ' ', '  ', '', '\n', '\n\n\n', '\t', ' \r\n ', '\xa0', '\u2003', ' ' * 17
CORPUS = [
  '47 47 12 12 4747 the cat and the cat the The and 2026 2026 1,000',
  "don't I'll naïve café café 你好 你好 世界 Привет return return x=1",
]


def texts(count: int, seed: int) -> list[str]:
  """Random texts of words that tell tokenizers apart."""
  draw = random.Random(seed)
  pieces = [
    [draw.choice(WORDS.split()) + draw.choice(GAPS) for _ in range(9)]
    for _ in range(count)
  ]
  return [''.join(row[: 1 + i % 9]) for i, row in enumerate(pieces)]


# --- tokenizers of all kinds


def trained(model, trainer, pre=None, normalizer=None, decoder=None):
  """Tokenizer with a vocabulary of the small corpus."""
  found = Tokenizer(model)
  if normalizer is not None:
    found.normalizer = normalizer
  # merges over digits, which a pre-tokenizer may then forbid
  found.pre_tokenizer = pre_tokenizers.Whitespace() if pre is None else pre
  found.train_from_iterator(CORPUS * 4, trainer)
  if decoder is not None:
    found.decoder = decoder
  return found


def byte_level(pre=None, normalizer=None, size=300, prefix=False):
  level = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
  found = trained(
    models.BPE(),
    trainers.BpeTrainer(
      vocab_size=size,
      special_tokens=SPECIAL,
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
      show_progress=False,
    ),
    level,
    normalizer,
    decoders.ByteLevel(),
  )
  if pre is not None:
    found.pre_tokenizer = pre_tokenizers.Sequence(
      [pre, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)]
    )
  return found


DIGITS = pre_tokenizers.Digits(individual_digits=True)
QWEN = pre_tokenizers.Split(
  Regex(r"'[a-z]+|\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), 'isolated'
)


def pieces(size=300):
  """BPE of pieces with bytes for what it does not know, as Llama 2 has it."""
  tokens = [*SPECIAL, *(f'<0x{i:02X}>' for i in range(256))]
  return trained(
    models.BPE(unk_token='<unk>', byte_fallback=True, fuse_unk=True),
    trainers.BpeTrainer(
      vocab_size=256 + size, special_tokens=tokens, show_progress=False
    ),
    pre_tokenizers.Metaspace(prepend_scheme='first', split=False),
    decoder=decoders.Sequence(
      [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
    ),
  )


def unigram(normalizer=None, scheme='always'):
  return trained(
    models.Unigram(),
    trainers.UnigramTrainer(
      vocab_size=90,
      special_tokens=SPECIAL,
      unk_token='<unk>',
      show_progress=False,
    ),
    pre_tokenizers.Metaspace(prepend_scheme=scheme),
    normalizer,
    decoders.Metaspace(),
  )


def wordpiece(normalizer=None, pre=None):
  return trained(
    models.WordPiece(unk_token='<unk>'),
    trainers.WordPieceTrainer(
      vocab_size=160, special_tokens=SPECIAL, show_progress=False
    ),
    pre or pre_tokenizers.BertPreTokenizer(),
    normalizer,
    decoders.WordPiece(),
  )


def posted(found, single: str):
  """Tokenizer whose post-processor adds special tokens."""
  ids = [(token, found.token_to_id(token)) for token in SPECIAL]
  found.post_processor = processors.TemplateProcessing(
    single=single, special_tokens=ids
  )
  return found


def cut_and_padded(found):
  found.enable_truncation(3)
  found.enable_padding(length=20, pad_token='<pad>', pad_id=0)
  return found


BERT = normalizers.BertNormalizer(lowercase=True)
NFKC = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
# {name: (tokenizer, model_type, tokenizer_class)}
KINDS = {
  'digits, wrong class': (lambda: byte_level(DIGITS), 'llama', 'GPT2Tokenizer'),
  'digits, no class': (lambda: byte_level(DIGITS), 'gpt2', None),
  'digits, generic class': (
    lambda: byte_level(DIGITS),
    'qwen2',
    'PreTrainedTokenizerFast',
  ),
  'bytes, its class': (
    lambda: byte_level(QWEN, normalizers.NFC()),
    'qwen3',
    'Qwen2Tokenizer',
  ),
  'bytes with a prefix': (
    lambda: byte_level(prefix=True),
    'gpt_neox',
    'GPTNeoXTokenizer',
  ),
  'bytes, cut and padded': (
    lambda: cut_and_padded(posted(byte_level(), '<s> $A')),
    'mistral',
    'LlamaTokenizerFast',
  ),
  'pieces, its class': (
    lambda: posted(pieces(), '<s> $A </s>'),
    'llama',
    'LlamaTokenizer',
  ),
  'pieces, wrong class': (pieces, 'gemma2', 'GPT2Tokenizer'),
  'unigram, wrong class': (unigram, 'llama', 'T5Tokenizer'),
  'unigram, no class': (lambda: unigram(NFKC, 'never'), 'gemma3_text', None),
  'word pieces, its class': (
    lambda: posted(wordpiece(BERT), '<s> $A </s>'),
    'llama',
    'BertTokenizer',
  ),
  'word pieces, no such class': (
    lambda: wordpiece(pre=pre_tokenizers.Whitespace()),
    'smollm3',
    'NoSuchTokenizer',
  ),
}


def write(at: Path, tokenizer, model_type='llama', kind=None, **settings):
  """Directory of a tokenizer, without weights."""
  at.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(at / 'tokenizer.json'))
  settings = {'eos_token': '</s>', 'pad_token': '<pad>'} | settings
  settings |= {'bos_token': '<s>', 'unk_token': '<unk>'}
  if kind is not None:
    settings['tokenizer_class'] = kind
  (at / 'tokenizer_config.json').write_text(json.dumps(settings))
  (at / 'config.json').write_text(json.dumps({'model_type': model_type}))
  return at


def of_file(at: Path) -> Tokenizer:
  """Tokenizer of the file itself, neither cutting nor padding."""
  found = Tokenizer.from_file(str(at / 'tokenizer.json'))
  found.no_truncation()
  found.no_padding()
  return found


@pytest.mark.parametrize('name', KINDS)
def test_ids_are_those_of_the_file(tmp_path, name):
  make, model_type, kind = KINDS[name]
  at = write(tmp_path, make(), model_type, kind)
  file, many = of_file(at), texts(200, len(name))
  found, _ = read_tokenizer(at, 10_000)
  want = [file.encode(text).ids for text in many]
  assert encode_texts(found, many, True) == want
  assert [found(text)['input_ids'] for text in many] == want
  bare = [file.encode(text, add_special_tokens=False).ids for text in many]
  assert [data.text_ids(found, text) for text in many] == bare
  assert data.decode_all(found, want) == file.decode_batch(want)
  assert found.batch_decode(want) == [
    file.decode(ids, skip_special_tokens=False) for ids in want
  ]
  start, _ = added_ids(found)
  prompts = data.encode_prompts(found, many)
  for ids, prompt in zip(bare, prompts, strict=True):
    assert prompt == (ids if ids[:1] == start else start + ids)
  assert max(map(len, prompts)) > 20  # nothing is cut
  named = {found.bos_token_id, found.eos_token_id, found.pad_token_id}
  assert named == {file.token_to_id(t) for t in ('<s>', '</s>', '<pad>')}


def test_a_class_that_is_named_reads_other_ids(tmp_path):
  """transformers alone, without which these tests would show nothing."""
  differ = set()
  for i, (name, (make, model_type, kind)) in enumerate(KINDS.items()):
    if auto_difference(write(tmp_path / str(i), make(), model_type, kind)):
      differ.add(name)
  assert differ >= {
    'digits, wrong class',
    'digits, generic class',
    'unigram, wrong class',
  }


def test_the_digits_of_the_issue(tmp_path):
  at = write(tmp_path, byte_level(DIGITS), 'llama', 'GPT2Tokenizer')
  found, _ = read_tokenizer(at, 10_000)
  ids = data.prompt_ids(found, '47-12=')
  assert found.convert_ids_to_tokens(ids) == list('47-12=')


# --- settings beside the file


def test_tokens_that_the_files_number_differently_are_refused(tmp_path):
  at = write(
    tmp_path,
    byte_level(),
    added_tokens_decoder={'999': {'content': '<|im_end|>'}},
  )
  said = "give tokens different ids: '<|im_end|>' is 999 and None; save the to"
  with pytest.raises(ValueError, match='save the tokenizer again') as e:
    read_tokenizer(at, 10_000)
  assert said in str(e.value)
  assert '\n' not in str(e.value)


TOKENS = 'a list of texts or of {"content": text}'
IDS = 'an object, {"id": {"content": text}}'
TEMPLATES = 'a text or a list of {"name": text, "template": text}'


@pytest.mark.parametrize(
  'file', ['tokenizer_config.json', 'special_tokens_map.json']
)
@pytest.mark.parametrize(
  ('name', 'value', 'kind'),
  [
    ('additional_special_tokens', 3, TOKENS),
    ('additional_special_tokens', ['<s>', 3], TOKENS),
    ('extra_special_tokens', '<s>', TOKENS),
    ('added_tokens_decoder', ['a'], IDS),
    ('added_tokens_decoder', {'x': {'content': '<s>'}}, IDS),
    ('added_tokens_decoder', {'1' * 5000: '<s>'}, IDS),
    ('added_tokens_decoder', {'1': 3}, IDS),
    ('eos_token', ['</s>'], 'a text or {"content": text}'),
    ('pad_token', {'text': '<pad>'}, 'a text or {"content": text}'),
    ('add_bos_token', 'no', 'true or false'),
    ('model_max_length', 'x', 'a number'),
    ('model_max_length', True, 'a number'),
    ('chat_template', 3, TEMPLATES),
    ('chat_template', ['a'], TEMPLATES),
    ('chat_template', [{'template': 'D'}], TEMPLATES),
    ('chat_template', [{'name': 'default'}], TEMPLATES),
    ('chat_template', {'default': 3}, TEMPLATES),
  ],
)
def test_a_setting_of_another_kind_is_named(tmp_path, file, name, value, kind):
  at = write(tmp_path, byte_level())
  (at / file).write_text(json.dumps({name: value}))
  said = f'{at / file}: {name} is {repr(value)[:60]}, not {kind}; correct it'
  assert refused(at).startswith(said)


def refused(at: Path) -> str:
  """Message of a refusal, one line."""
  with pytest.raises(ValueError, match=r'.') as e:
    read_tokenizer(at, 10_000)
  assert type(e.value) is ValueError
  assert '\n' not in str(e.value)
  return str(e.value)


@pytest.mark.parametrize(
  ('file', 'content', 'says'),
  [
    ('chat_template.json', b'"a"', 'a str, not an object; fetch it again'),
    ('chat_template.json', b'{"chat_template": 3}', 'chat_template is 3, not'),
    ('chat_template.jinja', b'\xff\xfe', 'the chat template is not UTF-8 ('),
    ('additional_chat_templates/a.jinja', b'\xff', 'the chat template is not'),
    ('tokenizer.json', b'\xef\xbb\xbf{}', 'it begins with a byte order mark'),
  ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, file, content, says):
  at = write(tmp_path, byte_level())
  (at / file).parent.mkdir(exist_ok=True)
  (at / file).write_bytes(content)
  assert refused(at).startswith(f'{at / file}: {says}')


def test_a_byte_order_mark_before_settings_is_passed_over(tmp_path):
  at = write(tmp_path, byte_level(), chat_template='S')
  settings = at / 'tokenizer_config.json'
  settings.write_text(settings.read_text(), 'utf-8-sig')
  found, _ = read_tokenizer(at, 10_000)
  assert (found.eos_token, found.chat_template) == ('</s>', 'S')
  (at / 'chat_template.jinja').write_text('F', 'utf-8-sig')
  assert read_tokenizer(at, 10_000)[0].chat_template == 'F'


def test_contradictions_are_told_and_the_file_holds(tmp_path):
  rstrip = {'2': {'content': '</s>', 'rstrip': True}}
  at = write(
    tmp_path,
    posted(byte_level(), '<s> $A'),
    add_bos_token=False,
    add_eos_token=False,
    added_tokens_decoder=rstrip,
  )
  found, notes = read_tokenizer(at, 10_000)
  assert found('a')['input_ids'] == of_file(at).encode('a').ids
  assert found('</s> a')['input_ids'] == of_file(at).encode('</s> a').ids
  assert len(notes) == 2
  assert 'add_bos_token false and tokenizer.json puts [1] before' in notes[0]
  assert 'how </s> takes the spaces around it' in notes[1]
  assert read_tokenizer(write(tmp_path, byte_level()), 10_000)[1] == ()


def test_a_special_token_that_the_file_lacks_is_none(tmp_path):
  at = write(
    tmp_path, byte_level(), eos_token='<|end|>', pad_token='[PAD]', sep_token=''
  )
  found, notes = read_tokenizer(at, 10_000)
  assert (found.eos_token_id, found.pad_token_id) == (None, None)
  assert len(found) == of_file(at).get_vocab_size()
  assert len(notes) == 1
  assert "eos_token '<|end|>', which tokenizer.json does not have" in notes[0]


def test_a_pad_that_only_the_settings_have_is_never_read(tmp_path):
  pad = {'pad_token': '[PAD]', 'added_tokens_decoder': {}}
  at = write(tmp_path, byte_level(), **pad)
  (at / 'added_tokens.json').write_text('{"[PAD]": 300}')
  found, _ = read_tokenizer(at, 10_000)
  assert found.pad_token_id is None
  (at / 'added_tokens.json').write_text('{"[PAD]": 300, "</s>": 300}')
  with pytest.raises(
    ValueError, match="ids: '</s>' is 300 and 2; save the tok"
  ):
    read_tokenizer(at, 10_000)


def test_a_vocabulary_without_a_token_for_the_unknown_is_read(tmp_path):
  words = Tokenizer(models.WordLevel({'</s>': 0, 'one': 1, 'two': 2}, '<unk>'))
  words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  posted = processors.TemplateProcessing(
    '$A </s>', special_tokens=[('</s>', 0)]
  )
  words.post_processor = posted
  found, _ = read_tokenizer(write(tmp_path, words), 3)
  assert data.prompt_ids(found, 'two one') == [2, 1]


def test_dropout_of_a_vocabulary_is_off(tmp_path):
  tokenizer = byte_level()
  at = write(tmp_path, tokenizer)
  file = at / 'tokenizer.json'
  described = json.loads(file.read_text())
  described['model']['dropout'] = 0.9
  file.write_text(json.dumps(described))
  found, _ = read_tokenizer(at, 10_000)
  for _ in range(9):
    assert data.prompt_ids(found, 'the cat') == tokenizer.encode('the cat').ids


ASKED = [{'role': 'user', 'content': 'x'}]


def test_where_a_chat_template_is_looked_for(tmp_path):
  named = [
    {'name': 'default', 'template': 'D'},
    {'name': 'rag', 'template': 'R'},
  ]
  at = write(tmp_path, byte_level(), chat_template=named)

  def text():
    found, _ = read_tokenizer(at, 10_000)
    return found.decode(data.prompt_ids(found, ASKED))

  assert text() == 'D'
  write(at, byte_level(), chat_template='S')
  assert text() == 'S'
  (at / 'chat_template.json').write_text('{"chat_template": "J"}')
  assert text() == 'J'
  (at / 'chat_template.jinja').write_text('F')
  assert text() == 'F'
  (at / 'additional_chat_templates').mkdir()
  (at / 'additional_chat_templates/tool_use.jinja').write_text('T')
  assert text() == 'F'
  found, _ = read_tokenizer(at, 10_000)
  (ids,) = data.encode_prompts(found, [ASKED], tools=[[{'name': 'f'}]])
  assert found.decode(ids) == 'T'


# --- start and end


@pytest.mark.parametrize(
  ('single', 'start'), [('$A </s>', []), ('<s> $A </s>', [1]), ('<s> $A', [1])]
)
def test_a_prompt_is_begun_once_and_never_ended(tmp_path, single, start):
  at = write(tmp_path, posted(byte_level(size=260), single))
  found, _ = read_tokenizer(at, 10_000)
  hi = data.text_ids(found, 'hi')
  assert hi == found.convert_tokens_to_ids(['h', 'i'])
  assert data.prompt_ids(found, 'hi') == start + hi
  assert data.prompt_ids(found, '<s>hi') == [1, *hi]
  assert data.prompt_ids(found, 'hi</s>') == [*start, *hi, 2]  # the user's own
  assert data.prompt_ids(found, '') == start
  for template in ('<s>{{ messages[0].content }}', '{{ messages[0].content }}'):
    found.chat_template = template
    begun = [1] if '<s>' in template else []
    message = {'role': 'user', 'content': 'hi'}
    assert data.prompt_ids(found, [message]) == begun + hi


@pytest.mark.parametrize('end', ['', ' </s>'])
@pytest.mark.parametrize(
  ('text', 'want'),
  [
    ('hi', 'hi'),
    ('<s>hi', 'hi'),
    ('<s><|im_start|>hi', 'hi'),
    ('<|im_start|>hi', '<|im_start|>hi'),
    ('<s><s>hi', '<s>hi'),
    ('<s>', ''),
    ('', ''),
  ],
)
def test_a_start_of_two_tokens_is_written_once(tmp_path, text, want, end):
  tokenizer = byte_level(size=260)
  tokenizer.add_special_tokens(['<|im_start|>'])
  start = [1, tokenizer.token_to_id('<|im_start|>')]
  tokenizer.post_processor = processors.TemplateProcessing(
    single=f'<s> <|im_start|> $A{end}',
    special_tokens=[('<s>', 1), ('</s>', 2), ('<|im_start|>', start[1])],
  )
  found, _ = read_tokenizer(write(tmp_path, tokenizer), 10_000)
  assert data.prompt_ids(found, text) == start + data.text_ids(found, want)


def test_an_answer_ends_once(tmp_path):
  found, _ = read_tokenizer(
    write(tmp_path, posted(byte_level(), '<s> $A </s>')), 999
  )
  hi = data.text_ids(found, 'hi')
  assert answer_ids(found, 'hi', (2, 0)) == [*hi, 2]
  assert answer_ids(found, 'hi<pad>', (2, 0)) == [*hi, 0]
  assert answer_ids(found, '', (2, 0)) == [2]


def test_stop_tokens_are_one_token_each(tmp_path):
  found, _ = read_tokenizer(write(tmp_path, byte_level()), 10_000)
  newline = found.convert_tokens_to_ids('Ċ')
  assert stop_ids(found, ('</s>', '\n', '0'), 400) == [2, newline, 0]
  with pytest.raises(
    ValueError, match=r"'#!' is 2 tokens of the tokenizer, \["
  ):
    stop_ids(found, ('#!',), 400)
  with pytest.raises(ValueError, match=r"'' is 0 tokens"):
    stop_ids(found, ('',), 400)
  with pytest.raises(
    ValueError, match=r"'400' is id 400 and the model has 400"
  ):
    stop_ids(found, ('400',), 400)


# --- directories of models


def with_tokenizer(at: Path, family: str, tokenizer, kind=None, **settings):
  """Directory of a small model with another tokenizer."""
  shutil.copytree(GOLDEN / family, at)
  config = (at / 'config.json').read_bytes()
  write(at, tokenizer, kind=kind, **settings)
  (at / 'config.json').write_bytes(config)
  return at


def set_ends(at: Path, **ends) -> None:
  for name, eos in ends.items():
    file = at / f'{name}.json'
    found = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(found | {'eos_token_id': eos}))


IM_END = AddedToken('<|im_end|>', special=True)
CHATML = (
  '{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n'
  '{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)


def small(*more):
  """Byte-level tokenizer of at most 264 ids."""
  found = byte_level(size=260)
  found.add_special_tokens(list(more))
  return found


def test_ends_are_the_union_and_the_chats_own_comes_first(tmp_path):
  at = with_tokenizer(tmp_path / 'model', 'llama', small(IM_END))
  set_ends(at, generation_config=257, config=258)
  assert open_model(at).end_tokens == (257, 258, 2)
  (at / 'chat_template.jinja').write_text(CHATML)
  assert open_model(at).end_tokens == (257, 258, 2)  # 260 ends nothing
  set_ends(at, generation_config=[2, 260])
  assert open_model(at).end_tokens == (260, 2, 258)


@pytest.mark.parametrize('family', ['llama', 'qwen3', 'qwen2'])
def test_an_export_reads_back_the_ids(tmp_path, family):
  digits = byte_level(DIGITS, size=264)
  many = texts(50, 1)
  at = with_tokenizer(tmp_path / 'model', family, digits, 'GPT2Tokenizer')
  (at / 'additional_chat_templates').mkdir()
  (at / 'additional_chat_templates/rag.jinja').write_text('R')
  set_ends(at, generation_config=257, config=[258, 257])
  model = open_model(at)
  out = save(tmp_path / 'out', model, read_params(model))
  again = open_model(out)
  want = [digits.encode(text).ids for text in many]
  assert data.encode_prompts(again.tokenizer, many) == want
  assert again.end_tokens == model.end_tokens == (257, 258, 2)
  generation = json.loads((out / 'generation_config.json').read_text())
  assert generation['eos_token_id'] == [257, 258, 2]
  assert (out / 'tokenizer.json').read_bytes() == (
    at / 'tokenizer.json'
  ).read_bytes()
  assert (out / 'additional_chat_templates/rag.jinja').read_text() == 'R'
  card = (out / 'README.md').read_text()
  # transformers takes one class for all of qwen2, whatever is named
  differs = auto_difference(out)
  assert (differs is None) == (family != 'qwen2')
  assert ('## Tokenizer' in card) == (family == 'qwen2')
  from transformers import PreTrainedTokenizerFast

  generic = PreTrainedTokenizerFast.from_pretrained(out)
  assert [generic(text)['input_ids'] for text in many] == want


# --- tokenizers of own texts


def test_a_frequent_word_becomes_a_token(tmp_path):
  """The order of the texts changes nothing, and every text is read back."""
  found = data.bpe_tokenizer(
    ['deux cent un', 'cent deux', 'mille cent'] * 3, 300
  )
  other = data.bpe_tokenizer(
    ['cent deux', 'mille cent', 'deux cent un'] * 3, 300
  )
  assert found.get_vocab() == other.get_vocab()
  assert len(found) <= 300
  ids = data.text_ids(found, 'mille cent deux')
  assert len(ids) == 3
  for text in (*CORPUS, '日本語 <b>', ' a\n b  c', ''):
    assert data.decode_all(found, [data.text_ids(found, text)]) == [text]
  assert found.eos_token_id != found.pad_token_id
  found.save_pretrained(tmp_path)
  again, notes = read_tokenizer(tmp_path, len(found))
  assert not notes
  assert data.text_ids(again, 'mille cent deux') == ids


def test_every_byte_has_a_token():
  assert len(data.bpe_tokenizer([], 258)) == 258
  with pytest.raises(ValueError, match='cannot hold every byte') as e:
    data.bpe_tokenizer(['a'], 257)
  assert '\n' not in str(e.value)
