"""Programs of the subset, drawn at random from a seed by a grammar of types.

One slot in twelve is filled with a value of any type, so that exceptions are
compared, too; a statement that raises is reported and the next one runs. Loops
are short and functions call only those above them, so every program ends.
"""

import random
import re

# leaves of each kind; a is an int at first, b a str, c a list, d a dict, e a
# float
LEAVES = {
  'int': 'a 0 1 2 3 5 7 (-1) (-4) 10 255 10**20 True i x',
  'float': 'e 0.0 0.5 (-2.25) 3.0 1e3 1e16 2.675',
  'str': "b '' 'a' 'abc' 'Hello' '12' 'é,c' 's'",
  'bool': 'True False None a b c',
  'list': "c [] [1,2] [3,1,2] ['b','a'] [0.5,2] [[1],[2]] [None]",
  'tuple': "() (1,) (1,2) ('a',2) (2,(3,))",
  'dict': "d {} {1:2} {'a':1,'b':2} {(1,):[]}",
  'set': "set() {1} {1,2,3} {'a'} frozenset([1])",
}
GRAMMAR = {
  'int': """
    ({int} + {int}) ({int} - {int}) ({int} * {int}) ({int} // {int}) ({int} %
    {int}) ({int} & {int}) ({int} | {int}) ({int} ^ {int}) ({int} << {small})
    ({int} >> {small}) ({int} ** {small}) (-{int}) (~{int}) len({seq})
    sum({ints}) abs({int}) max({int}, {int}) min({ints}) int({str})
    int({float}) ord({str}) {str}.find({str}) {str}.count({str})
    round({float}) {list}.count({any}) {list}.index({any}) {ints}[{int}]
    ({int} if {bool} else {int}) ({int} or {int}) pow({int}, {int}, 7)
    divmod({int}, {int})[0] int(a) {dict}.get({any}, {int}) sum(v for v in
    {ints} if {bool}) next(iter({seq}), {int}) (lambda x, i=2: {int})({int})
    ({int}).bit_length() sum([{int} for v in {seq}]) len({set})
    len({dict}.items()) sorted({ints})[0] [*{ints}][-1] max({ints},
    default={int}) (n := {int})
  """,
  'float': """
    ({float} + {int}) ({float} * {float}) ({int} / {int}) ({float} // {int})
    ({float} - {float}) ({float} % {float}) ({float} ** 2) float({int})
    (-{float}) abs({float}) round({float}, 2) float({str}) max({float}, {int})
    sum([{float}]) ({float}).is_integer() float('nan') float('inf')
  """,
  'str': """
    ({str} + {str}) ({str} * {small}) {str}[{int}] {str}[{int}:{int}]
    {str}[::-1] str({any}) repr({any}) {str}.upper() {str}.lower()
    {str}.strip() {str}.title() {str}.replace({str}, {str}) {str}.join({strs})
    {str}.join({str}) chr({int}) f'<«{any}!r:>6»>'
    f'«{int}:05d»|«{float}:.2f»|«{str}:<4»' f'«{any}»' f'«{int}:>+8,»'
    f'«{int}:#x»' f'«{any}:{spec}»' '«»-«»'.format({any}, {any}) ('%s|%r' %
    ({any}, {any})) ('%d' % {int}) ('%5.2f' % {float}) {str}.zfill(4)
    {str}.rjust({small}) {str}.center(7, '*') {str}.partition({str})[0]
    bin({int}) {str}.capitalize() {str}.swapcase() {str}.removeprefix({str})
    hex({int}) ({str} if {bool} else {str}) ({str} or {str})
    type({any}).__name__ {str}.lstrip({str}) max({str}) min({strs}, key=len)
    format({int}, {str}) {str}.translate(str.maketrans('abc', 'xyz'))
    {str}.expandtabs(3)
  """,
  'bool': """
    ({int} < {int}) ({int} == {any}) ({any} != {any}) ({float} >= {int})
    ({str} < {str}) ({int} < {int} <= {int}) ({any} in {seq}) ({str} in {str})
    ({any} not in {set}) (not {any}) ({bool} and {bool}) ({bool} or {any})
    bool({any}) all({seq}) any({seq}) isinstance({any}, int) ({any} is None)
    isinstance({any}, (str, list)) {str}.isdigit() {str}.isalpha()
    {str}.startswith({str}) ({list} == {list}) ({list} < {list}) ({any} in
    {dict}) ({set} <= {set}) {set}.isdisjoint({seq}) ({tuple} >= {tuple})
    callable({any}) any({bool} for v in {seq}) all({bool} for i in {ints})
    {str}.islower() ({dict} == {dict}) ({any} == {any} == {any})
    issubclass(bool, int)
  """,
  'list': """
    ({list} + {list}) ({list} * {small}) {list}[{int}:{int}] {list}[::-1]
    {list}[::{int}] list({seq}) sorted({seq}) sorted({seq}, key=str)
    {str}.split() {str}.split({str}) [{any}, {any}] [*{seq}, {any}]
    list(range({small})) {ints} [{any} for v in {seq}] [{any} for v in {seq}
    if {bool}] list(zip({seq}, {seq})) [{any} for v in {seq} for i in {ints}]
    list(map(str, {seq})) list({dict}) list(enumerate({seq}, {int}))
    list(reversed({list})) list(filter(None, {seq})) sorted({seq},
    reverse=True) {list}.copy() ({list} or {list}) list({any}) list({any} for
    i in {ints}) sorted({dict}.items()) {str}.splitlines() [f() for f in
    [lambda: v for v in {seq}]] [(y := {any}) for v in {seq}] list(map(lambda
    x: {any}, {ints})) [[{any} for i in {ints}] for v in {seq}]
    list(filter(lambda x: {bool}, {seq})) sum([{list}, {list}], []) [{dict}[v]
    for v in {dict}]
  """,
  'tuple': """
    ({tuple} + {tuple}) ({any}, {any}) ({any},) tuple({seq}) {tuple}[{int}:]
    ({tuple} * {small}) divmod({int}, {int}) {str}.partition({str}) (*{seq},
    {any}) tuple({any} for v in {seq})
  """,
  'dict': """
    «{any}: {any}» dict({dict}) «v: {any} for v in {seq}» ({dict} | {dict})
    «**{dict}, {any}: {any}» dict(zip({seq}, {seq})) dict.fromkeys({seq},
    {any}) {dict}.copy() dict(a={any}, b={any}) «i: {any} for i in {ints} if
    {bool}» dict([({any}, {any})])
  """,
  'set': """
    ({set} | {set}) ({set} & {set}) ({set} - {set}) ({set} ^ {set}) set({seq})
    «{any}, {any}» «{any} for v in {seq}» {set}.union({seq}) frozenset({seq})
    {set}.intersection({seq}) {set}.difference({seq}) set({dict}.keys())
  """,
}
SPECS = ('>6', '<5', '^7', '.2f', '05d', 'x', ',', '+', '.1%', 'e', '8.3', '=6')
KINDS = (*GRAMMAR, 'none')
SIMPLE = ('a', 'b', 'c', 'd', 'e', 'x', 'i', '3', '2.5', '-7', 'None')
CHOICES = {
  'small': ('0', '1', '2', '3', '-1'),
  'spec': SPECS,
  'ints': ('range(3)', '[3, 1, 2]', '(4, 5)', 'range(5, 0, -2)', 'c'),
  'strs': ("['a', 'bc']", "'xyz'", "b.split('l')", "['q']"),
}


def templates(kind: str) -> list[str]:
  """Templates of a kind: split at the spaces outside of brackets."""
  found, depth = [''], 0
  for c in ' '.join(GRAMMAR[kind].split()):
    depth += (c in '([«') - (c in ')]»')
    if c == ' ' and not depth:
      found.append('')
    else:
      found[-1] += c
  return found


TEMPLATES = {kind: templates(kind) for kind in GRAMMAR}


def value(r, kind='any', depth=2) -> str:
  """An expression of a kind."""
  if kind in CHOICES:
    return r.choice(CHOICES[kind])
  if r.random() < 1 / 12 or kind == 'any':
    kind = r.choice(KINDS)
  if kind == 'none':
    return 'None'
  if kind == 'seq':
    kind = r.choice(('list', 'str', 'tuple', 'set', 'dict'))
  if depth <= 0 or r.random() < 0.2:
    return r.choice(LEAVES[kind].split())
  return fill(r, r.choice(TEMPLATES[kind]), depth)


def fill(r, template: str, depth: int) -> str:
  """A template with its {slots} filled; « and » are its braces."""
  quoted = template.startswith("f'")  # no quotes inside quotes before 3.12

  def slot(found):
    if quoted and found[1] != 'spec':
      return r.choice(SIMPLE)
    text = value(r, found[1], depth - 1)
    return f'({text})' if template[found.end() :].startswith('.') else text

  text = re.sub(r'\{(\w+)\}', slot, template)
  return text.replace('«', '{').replace('»', '}')


TARGETS = {
  'a': 'int',
  'b': 'str',
  'c': 'list',
  'd': 'dict',
  'e': 'float',
  'a, b': 'tuple',
  'a, *c': 'seq',
  '*c, b': 'seq',
  '(a, [b, c])': 'any',
  'c[0]': 'any',
  'c[1:2]': 'list',
  "d['k']": 'any',
  'd[a]': 'any',
  'c[a]': 'int',
  'a = x': 'int',
  'd[b] = c[-1]': 'str',
  'c[::2]': 'list',
}
ACTIONS = """
  c.append({any}) c.extend({seq}) c.insert({int},{any}) c.pop() c.pop({int})
  c.remove({any}) c.sort() c.sort(key=str) c.reverse() c.clear() d.clear()
  d.update({dict}) d.setdefault({any},{any}) d.pop({any}) d.pop({any},{any})
  d.popitem() c.sort(reverse=True) c.missing() print({any},{any},sep={str})
  c.index({any},{small}) d.update(k={any}) d.get({any}) d.update([({any},1)])
"""
EXCEPTIONS = (
  *('ZeroDivisionError', 'TypeError', 'ValueError', 'KeyError', 'IndexError'),
  *('LookupError', 'ArithmeticError', 'NameError', 'AssertionError'),
  *('(TypeError, ValueError)', 'AttributeError', 'Exception', 'Exception'),
)


def statement(r, depth: int, inside=()) -> list[str]:
  """Lines of one statement; inside has 'function' and 'loop'."""

  def block(*more):
    return ['  ' + line for line in body(r, depth - 1, (*inside, *more))]

  kind = r.randint(0, 15 if depth else 7)
  if kind <= 2:
    target = r.choice(list(TARGETS))
    return [f'{target} = {value(r, TARGETS[target])}']
  if kind == 3:
    target = r.choice(('a', 'b', 'c', 'd', 'e', 'c[0]', 'd[1]'))
    operator = r.choice(('+', '+', '-', '*', '//', '%', '|', '&', '**', '<<'))
    return [f'{target} {operator}= {value(r, TARGETS.get(target, "int"), 1)}']
  if kind == 4:
    return [f'print({value(r)})']
  if kind == 5:
    return [fill(r, r.choice(ACTIONS.split()), 2)]
  if kind == 6:
    jumps = ['pass', f'del {r.choice("abcdex")}', f'assert {value(r, "bool")}']
    jumps += [f'raise {r.choice(EXCEPTIONS[:9])}({value(r, "any", 1)})']
    jumps += ['break', 'continue', 'continue'] * ('loop' in inside)
    jumps += [f'return {value(r)}'] * ('function' in inside)
    return [r.choice(jumps)]
  if kind == 7:
    return [f'd[{value(r, "str", 1)}] = {value(r)}']
  if kind <= 9:
    lines = [f'if {value(r, "bool")}:', *block()]
    if r.random() < 0.5:
      lines += [f'elif {value(r, "bool")}:', *block()]
    return lines + (['else:', *block()] if r.random() < 0.5 else [])
  if kind <= 12:
    return loop(r, block)
  return attempt(r, block)


def loop(r, block) -> list[str]:
  if r.random() < 0.3:
    lines = ['count = 0', 'while count < 3:', '  count += 1', *block('loop')]
  else:
    target = r.choice(('x', 'x', 'i', 'a', 'x, i', 'x, *c', 'd[0]'))
    source = r.choice(('{ints}', '{seq}', 'enumerate({seq})', 'd.items()'))
    source = f'list({fill(r, source, 1)})[:4]'
    lines = [f'for {target} in {source}:', *block('loop')]
  return lines + (['else:', *block()] if r.random() < 0.4 else [])


def attempt(r, block) -> list[str]:
  lines, clauses = ['try:', *block()], r.randint(0, 2)
  for _ in range(clauses):
    name = r.choice(('', ' as error'))
    lines += [f'except {r.choice(EXCEPTIONS)}{name}:', *block()]
    lines += ['  print(type(error).__name__)'] if name else []
    lines += ['  raise'] if r.random() < 0.2 else []
  if clauses and r.random() < 0.5:
    lines += ['else:', *block()]
  if not clauses or r.random() < 0.5:
    lines += ['finally:', *block()]
  return lines


def body(r, depth: int, inside=()) -> list[str]:
  lines = []
  for _ in range(r.randint(1, 3)):
    lines += statement(r, depth, inside)
  return lines


SIGNATURES = (
  ('x', '{any}'),
  ('x, i=2', '{int}, {int}'),
  ('x, *rest', '{int}, {any}, *{seq}'),
  ('x, *, i=3', '{int}, i={int}'),
  ('x=1, **more', 'x={any}, z={any}'),
  ('x, i', '{any}'),
  ('x, /, i=0, *rest, j=1, **more', '{int}, *{seq}, **{dict}'),
)


def function(r, name: str) -> list[str]:
  """A function or a generator, and a call of it."""
  signature, call = r.choice(SIGNATURES)
  call = f'{name}({fill(r, call, 1)})'
  lines = r.choice((['global a'], ['a, b, c, d, e = 1, "s", [2], {}, .5'], []))
  lines = lines + body(r, 2, ('function',))
  if r.random() < 0.3:
    lines += [f'yield {value(r)}', 'yield from c', f'return {value(r)}']
    call = f'list({call})'
  elif r.random() < 0.3:
    lines += ['def inner(y):', '  nonlocal x', f'  x = {value(r)}']
    lines += ['  return x, y', f'return inner({value(r)}), x']
  else:
    lines += [f'return {value(r)}']
  return [
    f'def {name}({signature}):',
    *indent(lines),
    *guard([f'print({call})']),
  ]


def indent(lines: list[str]) -> list[str]:
  return ['  ' + line for line in lines]


def guard(lines: list[str]) -> list[str]:
  """Lines whose exception is reported."""
  handler = ['except Exception as error:', '  print(type(error).__name__)']
  return ['try:', *indent(lines), *handler]


def program(seed: int) -> str:
  """A program: values, functions, statements."""
  r = random.Random(seed)
  lines = [
    'a, b, c, d, e, x, i = 3, "text", [4, 1], {1: 2, "k": []}, 2.5, 1, 0'
  ]
  for name in ('f', 'g')[: r.randint(0, 2)]:
    lines += function(r, name)
  for _ in range(r.randint(1, 6)):
    lines += guard(body(r, 2))
  lines += body(r, 1)  # an exception here ends the program
  return '\n'.join(lines) + '\n'
